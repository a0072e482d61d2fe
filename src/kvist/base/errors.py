"""Errors for the person who reads them: what went wrong, where, and what would work.

The command line prints the message of a `KvistError` on one line and exits with `exit_code`; anything else is
a defect of ours and keeps its traceback.
"""


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


class Overloaded(KvistError):
    """A request that must come again: the queue is full. `retry_after`: in how many seconds, about."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Stopping(KvistError):
    """A request that came, or was still waiting, while the server shuts down."""


class TimedOut(KvistError):
    """A request that took longer than it may."""


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
