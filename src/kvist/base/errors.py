"""Errors for the person who reads them: what went wrong, where, and what would work.

The command line prints the message of a `KvistError` on one line and exits with `exit_code`; anything else is
a defect of ours and keeps its traceback.
"""

import reprlib

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxlong = _SHOWN.maxother = 60
_SHOWN.maxlist = _SHOWN.maxtuple = _SHOWN.maxdict = _SHOWN.maxlevel = 3


def brief(value: object) -> str:
    """What a message shows of a value that somebody else wrote: its `repr`, at most some 80 characters on one line,
    made without walking through the rest."""
    shown = _SHOWN.repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def install(extra: str) -> str:
    """What the user types to have the packages of an extra: Kvist is installed from its checkout."""
    return f"pip install -e '.[{extra}]' in Kvist's checkout"


class KvistError(Exception):
    """A mistake or a limit that the user can act on. The message is one line."""

    exit_code = 1


class ConfigError(KvistError):
    """A model configuration that Kvist does not know how to run exactly."""


class UnknownFamily(ConfigError):
    """A model of an architecture that is none of ours."""


class WeightsError(KvistError):
    """A weight file that is missing, truncated, or does not fit its configuration."""


class ModelNotFound(KvistError):
    """A model name that resolves to nothing."""


class TextError(KvistError):
    """Text that cannot be tokenized, or a corpus that cannot be trained on."""


class RequestError(KvistError):
    """A request that can never run: an empty prompt, one longer than the context, a bad sampling value. `param`: the
    part of the request at fault, as in `tools.0.parameters`, where one is known."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextError(RequestError):
    """A request whose tokens are more than the context, or the cache, can ever hold."""


class NoRoom(KvistError):
    """Something to keep for which its owner's room is full: it has to remove some of what it keeps first."""


class PromptTooLong(ContextError):
    """A prompt of `tokens`, or at least so many, of which `most` leave room for an answer in a context of `context`.

    Clients know it by this text, digit for digit, and go on with a shorter prompt.
    """

    def __init__(self, tokens: int, most: int, context: int) -> None:
        super().__init__(f"prompt is too long: {tokens} tokens > {most} maximum")
        self.tokens = tokens
        self.most = most
        self.context = context


class Overloaded(KvistError):
    """A request that must come again: the queue is full. `retry_after`: in how many seconds, about."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Stopping(KvistError):
    """A request that came, or was still waiting, while the server shuts down."""


class TimedOut(KvistError):
    """A request that took longer than it may."""


class PluginError(KvistError):
    """A plug-in that cannot be imported, does not do what its protocol asks, or whose name is taken."""


class Closed(KvistError):
    """An `LLM` that is closed, or that belongs to another process."""


class OutOfBlocks(KvistError):
    """The pool has fewer free blocks than a reservation needs. Nothing was changed."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"the KV pool has {free} free blocks and this step needs {needed}")
        self.needed = needed
        self.free = free


class NumericsError(KvistError):
    """A model produced logits that are not numbers."""


class BackendError(KvistError):
    """An operator implementation that was asked for cannot run here."""


class InvariantError(AssertionError):
    """A `check()` found a structure in a state that it must never be in: a defect of ours, never a user's."""
