"""One prompt's way through an engine: text in, pieces of text out, then what it took."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvist.cache.layout import OPEN_BLOCKS, Layout
from kvist.runtime.engine import Engine
from kvist.runtime.request import FinishReason, Request, Sampling
from kvist.service.contexts import Context
from kvist.service.keeping import Kept
from kvist.service.loaded import Loaded
from kvist.service.text_stream import TextStream, stop_strings
from kvist.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Result:
    """What a generation came to. Times in seconds; `kv_bytes` is what its blocks took, whole blocks, open
    ones included; `kv_allocated_bytes` what the engine's planes take in all."""

    prompt_tokens: int
    tokens: list[int]
    text: str
    finish_reason: FinishReason
    prefill_seconds: float
    decode_seconds: float
    kv_codec: str
    kv_blocks: int
    kv_bytes: int
    kv_allocated_bytes: int
    kv_bytes_per_token: float
    cached: Mapping[str, int]  # tokens of the prompt that were not computed, by tier

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second until the first new token."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """New tokens per second after the first."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Opened:
    """A context, and the kept cache that has it."""

    context: Context
    kept: Kept


class Generation:
    """Iterate over it for the pieces of text; then `result()` says what it took.

    Other requests may run on the same engine: `engine.step` serves them too, and changes nothing here.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        request: Request,
        stops: Sequence[str] = (),
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._engine = engine
        self._sequence = engine.add(request)
        self._text = TextStream(tokenizer, request.stop_ids, stop_strings(tokenizer, stops))
        self._cancelled = cancelled
        self._pieces: list[str] = []

    def __iter__(self) -> Iterator[str]:
        sequence = self._sequence
        while sequence.finish_reason is None:
            if self._cancelled():
                self._engine.finish(sequence, FinishReason.CANCELLED)
                break
            for drawn in self._engine.step():
                if drawn.sequence is sequence and drawn.token is not None:
                    yield from self._emit(self._push(drawn.token))
        if sequence.error is not None:
            raise sequence.error
        yield from self._emit(self._text.finish())

    def result(self) -> Result:
        """Raises `RuntimeError` before the iteration has ended."""
        sequence = self._sequence
        if sequence.finish_reason is None:
            raise RuntimeError("the generation has not ended yet")
        times = sequence.times
        layout: Layout = self._engine.runner.layout
        return Result(
            prompt_tokens=len(sequence.request.prompt),
            tokens=sequence.new_tokens,
            text="".join(self._pieces),
            # A stop string may complete in the very token that exhausts the length.
            finish_reason=FinishReason.STOP if self._text.stop is not None else sequence.finish_reason,
            prefill_seconds=max(times.first - times.added, 0.0),
            decode_seconds=times.last - times.first,
            kv_codec=layout.kv,
            kv_blocks=sequence.kv_blocks,
            kv_bytes=sequence.kv_blocks * layout.block_bytes + OPEN_BLOCKS * layout.open_bytes,
            kv_allocated_bytes=self._engine.runner.store.nbytes,
            kv_bytes_per_token=layout.bytes_per_token,
            cached=dict(sequence.cached.tiers),
        )

    def _push(self, token: int) -> str:
        text = self._text.push(token)
        if self._text.stop is not None:
            self._engine.finish(self._sequence, FinishReason.STOP)
        return text

    def _emit(self, text: str) -> Iterator[str]:
        if text:
            self._pieces.append(text)
            yield text


def generate(
    loaded: Loaded,
    prompt: str,
    *,
    max_tokens: int,
    sampling: Sampling,
    stops: Sequence[str] = (),
    cancelled: Callable[[], bool] = lambda: False,
    opened: Opened | None = None,
) -> Generation:
    """A generation on an engine of its own, whose cache is just large enough for it; behind a context where one is
    `opened`. Nothing new is kept."""
    tokenizer = loaded.tokenizer()
    if opened is None:
        request = Request(tuple(tokenizer.encode(prompt)), max_tokens, sampling, tokenizer.eos_ids)
        engine = loaded.engine(loaded.room(len(request.prompt) + max_tokens))
    else:
        tokens = (*opened.context.tokens, *tokenizer.encode(prompt, add_special=False))
        imported = opened.context.imported
        request = Request(tokens, max_tokens, sampling, tokenizer.eos_ids, kept=False, imported=imported)
        engine = loaded.engine(loaded.room(len(tokens) + max_tokens, prefixes=True), opened.kept)
    return Generation(engine, tokenizer, request, stops, cancelled)
