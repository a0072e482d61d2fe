"""What the bodies of OpenAI's routes have in common: how strictly they are read, and how tokens are drawn.

Types and ranges are checked strictly: no number is read from a string. Fields that are not named are ignored, for
clients send new ones before servers know them, but those that would change the answer and cannot be had here are
refused (`refused`), each with what would work instead. `null` is always the same as leaving a field out.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    Tag,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from kvist.base.units import plural
from kvist.runtime.request import Sampling
from kvist.server.errors import ApiError
from kvist.service.chat import Options
from kvist.service.sampling import Proposed
from kvist.text.tokenizer import Tokenizer

MOST_CHOICES = 128
MOST_LOGPROBS = 20
MOST_STOPS = 16
_MOST_STOP = 4096  # characters
_MOST_BIASES = 1024
_MOST_DEPTH = 100  # of arrays and objects in each other
_MOST_STOP_IDS = 1024
_DAY, _HALF_HOUR = 86_400.0, 1800.0  # seconds
_LEAST, _MOST = -(2**63), 2**64 - 1  # whole numbers
_NESTED = frozenset({dict, list})
_MANY = 32  # values of a list, from which on it pays to look at them together
_INERT: tuple[Any, ...] = (None, False, "", [], {})  # what any field may be at which it asks for nothing
_NOTHING = Proposed()
_SMALLEST_TOP_P = 1e-6  # OpenAI allows 0: only the likeliest token


def _whole(value: Any) -> Any:
    """In JSON 2.0 is a whole number, as 2 is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole_list(values: Any) -> Any:
    """`_whole` of a list, which may be as long as a context."""
    return [*map(_whole, values)] if isinstance(values, list) and float in set(map(type, values)) else values


Integer = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Integer, Field(ge=1, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], BeforeValidator(whole_list)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
Stop = Annotated[str, Field(min_length=1, max_length=_MOST_STOP)]


def text_or_list(value: Any) -> str:
    """Which of two alternatives is meant, tagged "text" and "list", so that complaints are about that one alone."""
    return "text" if isinstance(value, str) else "list"


Stops = Annotated[
    Annotated[Stop, Tag("text")] | Annotated[list[Stop], Field(max_length=MOST_STOPS), Tag("list")],
    Discriminator(text_or_list),
]


def _end_at_first_error(schema: Any) -> None:
    """Of a list whose items are wrong, one complaint is made: a million would take long, and nobody reads them."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if part.get("type") == "list":
                part["fail_fast"] = True
            waiting += part.values()
        elif isinstance(part, list | tuple):
            waiting += part


class Fields(BaseModel):
    """Any object within a body."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _end_at_first_error(schema)
        return schema


class Body(Fields):
    """A whole body. `refused`: fields that may not be there, each with the reason; `inert`: the values at which one of
    them does nothing, beside those that are empty."""

    refused: ClassVar[Mapping[str, str]] = {}
    inert: ClassVar[Mapping[str, Sequence[Any]]] = {}

    model: str | None = Field(None, description="The name of the model that this server has; needs not be given.")

    @model_validator(mode="before")
    @classmethod
    def _check_values(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, reason in cls.refused.items():
            if name in body and not any(body[name] == inert for inert in (*_INERT, *cls.inert.get(name, ()))):
                raise PydanticCustomError(
                    "refused", "{param} is not supported: {reason}", {"param": name, "reason": reason}
                )
        _check_json(body)
        return body


class StreamOptions(Fields):
    include_usage: bool | None = None


class CacheOptions(Fields):
    """How the prompt is to be kept. All of it is anyway, until the room is needed; on disk others go first for `ttl`.
    `mode`: whether places are marked in the prompt, which makes no difference here."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m"] | None = None


class Generation(Body):
    """How tokens are drawn. What OpenAI does not have is named as vLLM names it."""

    temperature: float | None = Field(
        None, ge=0, le=100, description="0 is greedy; by default what the model proposes, or 1."
    )
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: Integer | None = Field(None, ge=-1, lt=2**31, description="0 or -1: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        Field(None, max_length=_MOST_BIASES)
    )
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**64, description="Another one for each request by default.")
    stop: Stops | None = None
    stop_token_ids: TokenIds | None = Field(
        None, max_length=_MOST_STOP_IDS, description="Tokens that end the answer, and are not part of its text."
    )
    min_tokens: Annotated[Integer, Field(ge=0, lt=2**31)] | None = Field(
        None, description="Before so many, no token ends the answer; stop strings do."
    )
    ignore_eos: bool | None = None
    priority: Integer | None = Field(None, ge=-(2**31), lt=2**31, description="Lower comes first; 0 by default.")
    stream: bool | None = None
    return_progress: bool | None = Field(
        None, description="Events of a stream say how far the prompt is computed, as llama.cpp's do."
    )
    context: str | None = Field(None, max_length=64, description="The name of a context that the prompt begins with.")
    prompt_cache_key: str | None = Field(
        None, max_length=256, description="Names what belongs together: a session, which is then explained as one."
    )
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = Field(
        None, description="24h: on disk others go first for a day; in_memory: nothing of it is kept beyond memory."
    )
    prompt_cache_options: CacheOptions | None = None

    def options(
        self,
        tokenizer: Tokenizer,
        tenant: str,
        *,
        max_tokens: int | None,
        choices: int = 1,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        proposed: Proposed = _NOTHING,
    ) -> Options:
        """`proposed`: how the model is sampled where the request says nothing. Raises `ApiError` (400) for a token that
        the vocabulary does not have."""
        ends = self.stop_token_ids or ()
        _check_token("stop_token_ids", max(ends, default=0), tokenizer)
        if max_tokens is not None and (self.min_tokens or 0) > max_tokens:
            text = f"min_tokens: {self.min_tokens} are more than the {max_tokens} that there may be at most"
            raise ApiError(400, text, param="min_tokens")
        return Options(
            max_tokens=max_tokens,
            sampling=self._sampling(tokenizer, proposed),
            stops=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            choices=choices,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            priority=self.priority or 0,
            tenant=tenant,
            ignore_eos=bool(self.ignore_eos),
            session=self.prompt_cache_key,
            kept=self.prompt_cache_retention in (None, "24h"),
            ttl=self._ttl,
            stop_ids=frozenset(ends),
            min_tokens=self.min_tokens or 0,
            progress=bool(self.stream and self.return_progress),
        )

    @property
    def asks_to_keep(self) -> bool:
        """Whether the prompt is asked to be kept for later, beyond what is done for any."""
        return self.prompt_cache_retention == "24h" or self.prompt_cache_options is not None

    @property
    def _ttl(self) -> float:
        if self.prompt_cache_retention == "24h":
            return _DAY
        return 0.0 if self.prompt_cache_options is None else _HALF_HOUR

    def _sampling(self, tokenizer: Tokenizer, proposed: Proposed) -> Sampling:
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        _check_token("logit_bias", max(bias, default=0), tokenizer)
        stated = Proposed(
            temperature=self.temperature,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            top_p=None if self.top_p is None else max(self.top_p, _SMALLEST_TOP_P),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        return replace(
            stated.over(proposed).sampling(secrets.randbits(64) if self.seed is None else self.seed % 2**64),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple(sorted(bias.items())),
        )


# Of vLLM's and llama.cpp's extensions, those that decide what is drawn and that Kvist does not have.
REFUSED_EXTENSIONS = {
    "bad_words": "use logit_bias",
    "allowed_token_ids": "use logit_bias",
    "use_beam_search": "answers are sampled; use n",
    "length_penalty": "it belongs to beam search",
    "logits_processors": "no code of clients runs here",
    "truncate_prompt_tokens": "a prompt is computed whole; shorten it yourself",
    "prompt_logprobs": "use /v1/completions with echo and logprobs",
    "include_stop_str_in_output": "stop strings are left out",
    "mirostat": "use temperature, top_p and min_p",
    "typical_p": "use top_p or min_p",
    "tfs_z": "use top_p or min_p",
    "dry_multiplier": "use repetition_penalty",
    "xtc_probability": "use temperature",
    "moderation": "nothing is moderated here",
    "access_programs": "this server takes part in none",
}
INERT_EXTENSIONS = {
    "length_penalty": (1,),
    "typical_p": (1,),
    "tfs_z": (1,),
}


def _check_token(field: str, token: int, tokenizer: Tokenizer) -> None:
    if token >= tokenizer.vocab_size:
        text = f"token {token} is not among the {plural(tokenizer.vocab_size, 'token')} of this model"
        raise ApiError(400, f"{field}: {text}", param=field)


# A place in a body: where the object or list lies that it is in, and its key there. None: the body itself.
_Place = tuple["_Place", str | int] | None


def _check_json(body: Any) -> None:
    """Raises for numbers that are none or that no 64 bits hold, for lone surrogates, and for what is nested too deeply,
    wherever in a body it stands: these would fail later, in places that cannot say so."""
    waiting: list[tuple[Any, _Place, int]] = [(body, None, 0)]
    while waiting:
        value, place, depth = waiting.pop()
        if depth > _MOST_DEPTH:
            raise PydanticCustomError(
                "too_deep", "the body is nested more than {most} levels deep", {"most": _MOST_DEPTH}
            )
        if isinstance(value, list) and len(value) > _MANY and _are_fine(value):
            waiting += [(item, (place, index), depth + 1) for index, item in enumerate(value) if type(item) in _NESTED]
            continue
        is_object = isinstance(value, dict)
        for key, item in value.items() if is_object else enumerate(value):
            if type(item) in _NESTED:
                waiting.append((item, (place, key), depth + 1))
            if reason := _reason_against(item) or (is_object and _reason_against(key)):
                param = _name_of((place, key))
                raise PydanticCustomError("bad_value", "{param}: {reason}", {"param": param, "reason": reason})


def _are_fine(values: list[Any]) -> bool:
    """Whether none of the values is refused. There may be half a million numbers, so each kind is looked at by what
    runs without the interpreter."""
    kinds = set(map(type, values))

    def of(kind: type) -> list[Any]:
        return values if len(kinds) == 1 else [value for value in values if type(value) is kind]

    if int in kinds and not (min(of(int)) >= _LEAST and max(of(int)) <= _MOST):
        return False
    if float in kinds and not all(map(math.isfinite, of(float))):
        return False
    return str not in kinds or not _reason_against("".join(of(str)))


def _name_of(place: _Place) -> str:
    path = []
    while place is not None:
        place, key = place
        path.append(str(key))
    return ".".join(reversed(path)).encode("ascii", "backslashreplace").decode()[:200]


def _reason_against(value: Any) -> str:
    if isinstance(value, str):
        if value.isascii():
            return ""
        try:
            value.encode()
        except UnicodeEncodeError:
            return "the text holds a lone surrogate, which is no character"
    elif isinstance(value, float):
        return "" if math.isfinite(value) else "the number is not finite"
    elif isinstance(value, int):
        return "" if _LEAST <= value <= _MOST else "the number does not fit 64 bits"
    return ""
