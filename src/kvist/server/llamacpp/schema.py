"""The bodies of llama.cpp's own routes."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from kvist.server.llamacpp.sampling import Sampler
from kvist.server.openai.body import MOST_LOGPROBS, Body, Integer, TokenId, whole_list
from kvist.server.openai.chat_schema import ChatBody

_MOST_BIASES = 1024
_MOST_PIECES = 4_000_000


def prompt_kind(prompt: Any) -> str:
    """Whether a prompt is a text or a list of texts and token ids, which together are one."""
    return "text" if isinstance(prompt, str) else "pieces"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[
        list[TokenId | str], Field(min_length=1, max_length=_MOST_PIECES), BeforeValidator(whole_list), Tag("pieces")
    ],
    Discriminator(prompt_kind),
]


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# A token, or a text whose tokens are meant; and what is added to the logit, or False: never.
Bias = Annotated[tuple[Annotated[Integer, Field(ge=0, lt=2**31)] | str, float | Literal[False]], BeforeValidator(_pair)]


class LlamaCompletionBody(Body, Sampler):
    """The body of `/completion`. `n_predict`: -1, or none: as many as the context leaves. `cache_prompt` is accepted:
    prompts are always read from the cache where they can be, which changes no bit of an answer; and so are the fields
    that say how llama.cpp divides its work (`id_slot`, `n_keep`, `t_max_predict_ms` excepted)."""

    refused: ClassVar = {
        "multimodal_data": "the model reads text alone",
        "image_data": "the model reads text alone",
        "input_prefix": "models here continue a text and do not fill gaps in one",
        "input_suffix": "models here continue a text and do not fill gaps in one",
        "lora": "adapters are models of their own names here",
        "t_max_predict_ms": "give n_predict, or end the request",
        "n_indent": "use a grammar",
        "post_sampling_probs": "probabilities are the model's own, before anything is filtered",
        "response_fields": "all fields are sent",
        "grammar_lazy": "a grammar holds from the first token on",
    }

    prompt: Prompt
    n_predict: Integer | None = Field(None, ge=-2, lt=2**31, description="-1 or none: as many as the context leaves.")
    stream: bool | None = None
    n_probs: Annotated[Integer, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[list[Bias], Field(max_length=_MOST_BIASES)] | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = Field(None, description="In GBNF.")
    cache_prompt: bool | None = None
    return_tokens: bool | None = None


class ApplyTemplateBody(ChatBody):
    """A conversation as `/v1/chat/completions` takes it."""
