"""Answers in the shapes of llama.cpp's server."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from kvist.runtime.request import FinishReason
from kvist.server.clock import Clock
from kvist.server.logs import Note
from kvist.server.openai.logprobs import TokenTexts, finite
from kvist.server.openai.replies import noted_cache
from kvist.server.openai.stream import event, raise_failure
from kvist.service.chat import Options
from kvist.service.session import Delta, NewToken, Session

_NO_SLOT = -1  # sequences have none


class Completion:
    """One completion under way. `prompt`: as it was sent; `wanted`: how many tokens at most, None: as the context
    leaves; of 0 the prompt alone is computed, by drawing a token that nobody is shown."""

    def __init__(
        self, session: Session, model: str, prompt: str, options: Options, wanted: int | None, texts: TokenTexts
    ) -> None:
        self._session = session
        self._model = model
        self._prompt = prompt
        self._options = options
        self._shows = wanted != 0
        self._texts = texts
        self._clock = Clock()
        self._stop_type, self._stop = "none", ""

    async def whole(self, noted: Note, ids: bool) -> dict[str, Any]:
        """The answer once it is complete. `ids`: with its token ids."""
        text, tokens = [], list[NewToken]()
        async for delta in self._deltas():
            text.append(delta.text)
            tokens += delta.tokens
        noted.finish = self._stop_type
        return self._last("".join(text), tokens, ids)

    async def events(self, noted: Note) -> AsyncIterator[bytes]:
        """The stream: what each step adds, then an event that has all but the text."""
        async for delta in self._deltas():
            if delta.text or delta.tokens:
                yield event(
                    {
                        "index": 0,
                        "content": delta.text,
                        "tokens": [token.id for token in delta.tokens],
                        "stop": False,
                        "id_slot": _NO_SLOT,
                        "tokens_predicted": self._session.new_tokens,
                        "tokens_evaluated": self._session.prompt_tokens,
                        **self._probabilities(delta.tokens),
                    }
                )
        noted.finish = self._stop_type
        yield event(self._last("", [], False))

    async def _deltas(self) -> AsyncIterator[Delta]:
        async for delta in self._session:
            raise_failure(delta.error, delta.finish_reason)
            self._clock.note(len(delta.tokens))
            if delta.finish_reason is not None:
                limit = delta.finish_reason is FinishReason.LENGTH
                self._stop_type = "limit" if limit else "eos" if delta.stop is None else "word"
                self._stop = delta.stop or ""
            if self._shows:
                yield delta

    def _last(self, text: str, tokens: Sequence[NewToken], ids: bool) -> dict[str, Any]:
        session, new = self._session, self._session.new_tokens if self._shows else 0
        return {
            "index": 0,
            "content": text,
            "tokens": [token.id for token in tokens] if ids else [],
            "id_slot": _NO_SLOT,
            "stop": True,
            "model": self._model,
            "tokens_predicted": new,
            "tokens_evaluated": session.prompt_tokens,
            "tokens_cached": session.cached_tokens,
            "generation_settings": settings_of(self._options),
            "prompt": self._prompt,
            "truncated": False,
            "stop_type": self._stop_type,
            "stopping_word": self._stop,
            "timings": self._timings(new),
            **self._probabilities(tokens),
            **noted_cache([session]),
        }

    def _timings(self, new: int) -> dict[str, Any]:
        computed = self._session.prompt_tokens - self._session.cached_tokens
        return {
            "cache_n": self._session.cached_tokens,
            **_pace("prompt", computed, self._clock.prefill),
            **_pace("predicted", new, self._clock.decode),
        }

    def _probabilities(self, tokens: Sequence[NewToken]) -> dict[str, Any]:
        """Of tokens whose log-probabilities were asked for; else nothing."""
        found = [(token.id, token.logprobs) for token in tokens if token.logprobs is not None]
        entries = [
            {
                **self._entry(token, logprobs.logprob),
                "top_logprobs": [self._entry(*one) for one in logprobs.top[: self._options.logprobs]],
            }
            for token, logprobs in found
        ]
        return {"completion_probabilities": entries} if entries else {}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._texts(token)
        return {"id": token, "token": text, "bytes": raw, "logprob": finite(logprob)}


def settings_of(options: Options) -> dict[str, Any]:
    """How tokens are drawn, in llama.cpp's words."""
    sampling = options.sampling
    return {
        "n_predict": -1 if options.max_tokens is None else options.max_tokens,
        "seed": sampling.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": -1,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": list(options.stops),
        "n_probs": options.logprobs or 0,
        "ignore_eos": options.ignore_eos,
    }


def _pace(what: str, tokens: int, seconds: float) -> dict[str, Any]:
    return {
        f"{what}_n": tokens,
        f"{what}_ms": 1000 * seconds,
        f"{what}_per_token_ms": 1000 * seconds / tokens if tokens else 0.0,
        f"{what}_per_second": tokens / seconds if seconds else 0.0,
    }
