"""`kvist chat`: a conversation in the terminal."""

import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from kvist.base.errors import KvistError
from kvist.cli.keys import KEY_VARIABLE
from kvist.cli.options import Dtype, Json, Kv, Model, Weights, note, print_json
from kvist.cli.process import Threads, prepare
from kvist.cli.run import INTERRUPTED

if TYPE_CHECKING:
    from kvist.cli.chat_sources import Answer, Message, Source, Wish

# Of what a model writes, a terminal gets text, line ends and tabs: no other control characters.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def chat(
    model: Model = None,
    url: Annotated[
        str | None,
        typer.Option(help=f"Ask a server instead, as in http://127.0.0.1:8000; its key from {KEY_VARIABLE}."),
    ] = None,
    name: Annotated[str | None, typer.Option("--model", help="The server's model; by default its first.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before all else.")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="One message, one answer; '-' reads stdin.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most new tokens of an answer; by default what the context leaves.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; by default what the model proposes, or 1.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers; by default new ones.")] = None,
    dtype: Dtype = None,
    kv: Kv = None,
    weights: Weights = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Talk with a model, in this process or on a server. Ctrl-C ends an answer; /clear begins anew, /quit ends."""
    if as_json and prompt is None:
        raise KvistError("--json needs a message: give one with --prompt")
    if url is not None and not (model is None and dtype is None and kv is None):
        raise KvistError("with --url the server has the model: MODEL, --dtype and --kv are for this process")
    if url is None:
        prepare(threads)
    elif threads is not None:
        raise KvistError("with --url the server computes: --threads is for this process")
    if url is None and name is not None:
        raise KvistError("--model names a server's model and needs --url; a model of this process is given without it")
    if prompt == "-":
        prompt = sys.stdin.read()

    from kvist.cli.chat_sources import Wish

    with ExitStack() as stack:
        source = _source(stack, model, dtype, kv, weights, url, name)
        conversation = _Conversation(source, system, Wish(max_tokens, temperature, seed))
        if prompt is None:
            _talk(conversation)
            return
        answer, interrupted = conversation.ask(prompt, quiet=as_json)
        if as_json:
            print_json(_as_json(source.name, answer))
        if interrupted:
            raise typer.Exit(INTERRUPTED)


class _Conversation:
    """What was said, and how it goes on."""

    def __init__(self, source: "Source", system: str | None, wish: "Wish") -> None:
        self._source = source
        self._wish = wish
        self._first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._first)

    def clear(self) -> None:
        """Forget all but what the model is told at first."""
        self._messages = list(self._first)

    def ask(self, text: str, quiet: bool) -> "tuple[Answer, bool]":
        """One message and its answer, shown as it comes, and whether Ctrl-C ended it. What came until then stays said;
        a message without any answer does not. Raises `KvistError` where there can be no answer."""
        from kvist.cli.chat_sources import Answer

        answer, interrupted, screen = Answer(), False, _Screen(quiet)
        messages = [*self._messages, {"role": "user", "content": text}]
        try:
            self._source.ask(messages, self._wish, answer, screen.show)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            screen.end()
        if answer.text:
            self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        if not quiet and sys.stdout.isatty():
            note(_summary(answer, interrupted))
        return answer, interrupted


class _Screen:
    """Shows an answer as it comes: reasoning dimmed, and on a terminal alone, since it is not the answer."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stdout.isatty()
        self._dimmed = self._begun = False

    def show(self, piece: str, is_reasoning: bool) -> None:
        if self._quiet or (is_reasoning and not self._terminal):
            return
        if is_reasoning != self._dimmed:
            self._write(_DIM if is_reasoning else f"{_PLAIN}\n\n")
            self._dimmed = is_reasoning
        self._write(piece.translate(_CONTROLS) if self._terminal else piece)

    def end(self) -> None:
        if self._begun:
            self._write(f"{_PLAIN}\n" if self._dimmed else "\n")

    def _write(self, text: str) -> None:
        self._begun = True
        print(text, end="", flush=True)


def _source(
    stack: ExitStack,
    model: str | None,
    dtype: str | None,
    kv: str | None,
    weights: str | None,
    url: str | None,
    name: str | None,
) -> "Source":
    if url is not None:
        from kvist.cli.chat_sources import remote

        return stack.enter_context(remote(url, name, os.environ.get(KEY_VARIABLE)))
    from kvist.cli.chat_local import local
    from kvist.service.loaded import open_model

    source = stack.enter_context(local(open_model(model, dtype=dtype, kv=kv, weights=weights)))
    if source.sampled:
        note(f"the model proposes {source.sampled}")
    return source


def _talk(conversation: _Conversation) -> None:
    """Message after message, until the input ends."""
    while (line := _read()) is not None:
        match line.strip():
            case "":
                pass
            case "/quit":
                return
            case "/clear":
                conversation.clear()
            case text if text.startswith("/"):
                note("there are /clear and /quit")
            case text:
                try:
                    conversation.ask(text, quiet=False)
                except KvistError as error:
                    note(f"kvist: {error}")


def _read() -> str | None:
    """A line from the user; None at the end of input, or on Ctrl-C where nothing is being answered."""
    terminal = sys.stdin.isatty()
    try:
        if terminal:
            import readline  # noqa: F401  (gives `input` its editing and history)
        return input("> " if terminal else "")
    except (EOFError, KeyboardInterrupt):
        if terminal:
            print()
        return None


def _summary(answer: "Answer", interrupted: bool) -> str:
    parts = []
    if answer.prompt_tokens is not None:
        cached = "" if answer.cached_tokens is None else f", {answer.cached_tokens:,} cached"
        parts.append(f"{answer.prompt_tokens:,} prompt tokens{cached}")
    if answer.new_tokens is not None:
        parts.append(f"{answer.new_tokens:,} new" + ("" if answer.rate is None else f" at {answer.rate:,.1f}/s"))
    if interrupted:
        parts.append("stopped")
    elif answer.finish not in ("stop", None):
        parts.append(str(answer.finish))
    return " · ".join(parts)


def _as_json(name: str, answer: "Answer") -> dict[str, object]:
    return {
        "model": name,
        "text": answer.text,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "new_tokens": answer.new_tokens,
        "timings": {
            "first_token_s": None if answer.first is None else answer.first - answer.started,
            "decode_tokens_per_s": answer.rate,
        },
    }
