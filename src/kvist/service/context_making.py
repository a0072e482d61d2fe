"""From a text to a context: its tokens are run once, and what that gives is written and pinned."""

from collections.abc import Callable, Sequence

from kvist.base.errors import ConfigError, KvistError
from kvist.runtime.request import FinishReason, Request
from kvist.service.contexts import CHAT, Context, Contexts, chat_tokens, check_room, describe, finish
from kvist.service.keeping import Kept
from kvist.service.loaded import Loaded
from kvist.text.chat import ChatTemplate
from kvist.text.tokenizer import Tokenizer

FLUSH = 600.0  # seconds in which all of a context must have been written


def make_context(
    loaded: Loaded,
    kept: Kept,
    name: str,
    form: str,
    text: str,
    sources: Sequence[str],
    *,
    watch: Callable[[int, int], None] = lambda done, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Context | None:
    """Compute a context and keep it; None when it was cancelled. `watch` is told of tokens.

    Raises `KvistError` for a text that is too short or too long, and where the disk has no room, before anything is
    computed."""
    tokens = context_tokens(form, text, ChatTemplate.load(loaded.directory), loaded.tokenizer())
    layout = loaded.layout
    context = describe(name, "", form, text, tokens, sources, kept.identity, layout.block_size, layout.block_bytes)
    check_room(context, loaded.config.max_positions, kept.disk)
    engine = loaded.engine(loaded.room(len(tokens) + 1, prefixes=True), kept)
    sequence = engine.add(Request(tuple(tokens), 1, durable=True))
    while not engine.idle:
        if cancelled():
            engine.finish(sequence, FinishReason.CANCELLED)
            return None
        engine.step()
        watch(sequence.lease.length if sequence.lease is not None else len(tokens), len(tokens))
    if sequence.error is not None:
        raise sequence.error
    if not engine.keeper.flush(FLUSH):
        raise KvistError(f"the context was not written within {FLUSH:g} s; is the disk at work?")
    finish(context, Contexts(kept.disk.folder), kept.disk)
    return context


def context_tokens(form: str, text: str, template: ChatTemplate | None, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a context of that form. Raises `KvistError`."""
    return chat_tokens(text, template, tokenizer) if form == CHAT else tokenizer.encode(text)


def usable(context: Context, kept: Kept) -> Context:
    """The context. Raises `ConfigError` when another model, or the same over other codecs, made its KV."""
    differs = context.identity.differences(kept.identity)
    if differs:
        raise ConfigError(
            f"the context {context.name!r} was made by {context.identity.model} with another {', '.join(differs)}: "
            "open that model with the same --kv and --dtype, or make the context again"
        )
    return context
