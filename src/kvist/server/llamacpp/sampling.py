"""How tokens are drawn in llama.cpp's words, which are Ollama's, too, and what they mean here.

What is not given is as it is on all routes of this server. Of what llama.cpp has beyond that, values that change
nothing are taken and others refused, each with the reason.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from kvist.server.errors import ApiError
from kvist.server.openai.body import Body, Fields, Integer, Stops

_ORDERED = "samplers come in one order here: penalties, temperature, top-k, top-p, min-p"


def only(value: float, reason: str) -> AfterValidator:
    """A validator that takes `value` alone, at which nothing changes."""

    def check(given: float | None) -> float | None:
        if given is not None and given != value:
            raise PydanticCustomError("refused", "it is not supported: {reason}", {"reason": reason})
        return given

    return AfterValidator(check)


def empty(reason: str) -> AfterValidator:
    """A validator that takes what is empty alone."""

    def check(given: Any) -> Any:
        if given not in (None, False, [], {}, ""):
            raise PydanticCustomError("refused", "it is not supported: {reason}", {"reason": reason})
        return given

    return AfterValidator(check)


class Sampler(Fields):
    """The fields that decide what is drawn."""

    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy.")
    top_k: Integer | None = Field(None, ge=-(2**31), lt=2**31, description="0 or less: all tokens.")
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**64, description="-1, or none: another one each time.")
    stop: Stops | None = None
    repeat_penalty: float | None = Field(None, gt=0, le=100, description="Of the tokens of prompt and answer.")
    repeat_last_n: Integer | None = Field(None, ge=-1, lt=2**31, description="0: no penalty; else all are looked at.")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Of the answer's tokens.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    typical_p: Annotated[float | None, only(1, "use top_p or min_p")] = None
    tfs_z: Annotated[float | None, only(1, "use top_p or min_p")] = None
    mirostat: Annotated[Integer | None, only(0, "use top_p or min_p")] = None
    dynatemp_range: Annotated[float | None, only(0, "the temperature stays as it is")] = None
    xtc_probability: Annotated[float | None, only(0, "use min_p")] = None
    dry_multiplier: Annotated[float | None, only(0, "use repeat_penalty")] = None
    top_n_sigma: Annotated[float | None, only(-1, "use min_p")] = None
    samplers: Annotated[list[str] | str | None, empty(_ORDERED)] = None

    def fields(self) -> dict[str, Any]:
        """The same in the words of OpenAI's routes, which say what each is to the engine. Raises `ApiError` (400) for a
        penalty that looks at some tokens alone."""
        penalty = None if self.repeat_last_n == 0 else self.repeat_penalty
        if penalty not in (None, 1) and self.repeat_last_n not in (None, -1):
            text = "repeat_last_n: the penalty looks at all of prompt and answer here; leave it out, or give -1"
            raise ApiError(400, text, param="repeat_last_n")
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "seed": None if self.seed == -1 else self.seed,
            "stop": self.stop,
            "repetition_penalty": penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }


AnyBody = TypeVar("AnyBody", bound=Body)


def translated(kind: type[AnyBody], fields: Mapping[str, Any]) -> AnyBody:
    """A body of OpenAI's of these fields. Raises `ApiError` (400) for what it cannot have."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ApiError(400, f"{place}: {first['msg']}" if place else first["msg"], param=place or None) from None
