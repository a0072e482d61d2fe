"""The bodies of Ollama's routes, as its clients send them."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from kvist.server.llamacpp.sampling import Sampler, empty
from kvist.server.openai.body import MOST_LOGPROBS, Body, Fields, Integer, text_or_list
from kvist.server.openai.chat_schema import MOST_MESSAGES, MOST_TOOLS

_TEXT_ALONE = "the model reads text alone, no images"
_OWN_TEMPLATE = "the model's own is used; raw: true goes without one"


class Options(Sampler):
    """What Ollama calls options. Those that say where and how fast its own engine runs (`num_ctx`, `num_gpu`,
    `num_thread`, `num_keep`, ...) are accepted and change nothing: a server has one context, which `/api/show` has."""

    num_predict: Integer | None = Field(None, ge=-2, lt=2**31, description="-1 or none: as many as there is room for.")


def _format_kind(format: Any) -> str:
    return "name" if isinstance(format, str) else "schema"


Format = Annotated[
    Annotated[Literal["", "json"], Tag("name")] | Annotated[dict[str, Any], Tag("schema")], Discriminator(_format_kind)
]


def _think_kind(think: Any) -> str:
    return "level" if isinstance(think, str) else "switch"


Think = Annotated[
    Annotated[bool, Tag("switch")] | Annotated[Literal["low", "medium", "high", "max"], Tag("level")],
    Discriminator(_think_kind),
]


class Asked(Body):
    """What all have. `keep_alive` is accepted, and the model stays in memory."""

    options: Options | None = None
    keep_alive: str | float | None = None


class Generating(Asked):
    """What the two routes that write have."""

    stream: bool | None = Field(None, description="True by default.")
    format: Format | None = None
    think: Think | None = Field(None, description="As the model's template has it by default.")
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=MOST_LOGPROBS)] | None = None


class CalledFunction(Fields):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: dict[str, Any] = Field(default_factory=dict)


class Call(Fields):
    id: Annotated[str, Field(max_length=256)] | None = None
    function: CalledFunction


class Message(Fields):
    role: Literal["system", "user", "assistant", "tool", "developer"]
    content: str | None = None
    thinking: str | None = None
    images: Annotated[list[str] | None, empty(_TEXT_ALONE)] = None
    tool_calls: Annotated[list[Call], Field(max_length=256)] | None = None
    tool_name: Annotated[str, Field(max_length=256)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None


class OllamaChatBody(Generating):
    messages: Annotated[list[Message], Field(max_length=MOST_MESSAGES)] = Field(default_factory=list)
    tools: Annotated[list[dict[str, Any]], Field(max_length=MOST_TOOLS)] | None = None


class GenerateBody(Generating):
    refused: ClassVar = {
        "images": _TEXT_ALONE,
        "suffix": "models here continue a text and do not fill gaps in one",
        "template": _OWN_TEMPLATE,
        "context": "send the messages so far to /api/chat: what of them is known is read from the cache",
    }

    prompt: str = ""
    system: str | None = None
    raw: bool | None = Field(None, description="The prompt goes to the model as it is, without the chat template.")


class EmbedBody(Asked):
    """`truncate`: texts that the context does not hold are cut at its end, as Ollama does unless it is false."""

    input: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[str], Field(max_length=2048), Tag("list")],
        Discriminator(text_or_list),
    ] = Field(default_factory=list)
    truncate: bool | None = None
    dimensions: Annotated[Integer, Field(ge=1, lt=2**31)] | None = Field(None, description="As many as there are.")


class OldEmbedBody(Asked):
    """The body of `/api/embeddings`, which came before."""

    prompt: str


class ShowBody(Body):
    """`name` is what `model` was called before."""

    name: str | None = None
