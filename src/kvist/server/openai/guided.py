"""What a text must be, in the names that vLLM has for it: `structured_outputs`, the older `guided_*`, and llama.cpp's
`json_schema` and `grammar`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from kvist.server.errors import ApiError
from kvist.server.openai.body import REFUSED_EXTENSIONS, Fields, Generation, text_or_list
from kvist.service.guide import Guide, GuideKind

_MOST_SCHEMA = 1 << 20  # characters
_MOST_GRAMMAR = 1 << 14
_MOST_CHOICES = 1024

Schema = Annotated[
    Annotated[str, Field(max_length=_MOST_SCHEMA), Tag("text")] | Annotated[dict[str, Any], Tag("list")],
    Discriminator(text_or_list),
]
Grammar = Annotated[str, Field(max_length=_MOST_GRAMMAR)]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=_MOST_CHOICES)
]


@dataclass(frozen=True)
class Form:
    """What a text must be: JSON of a schema (`{}`: any object), or what a guide says. Both None: any text."""

    schema: Mapping[str, Any] | None = None
    guide: Guide | None = None


class StructuredOutputs(Fields):
    """One of these, as newer versions of vLLM have them."""

    json_: Schema | None = Field(None, alias="json")
    regex: Grammar | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None
    json_object: bool | None = None


class Guided(Generation):
    """A body whose answer may be held to a form."""

    refused: ClassVar[Mapping[str, str]] = {
        **REFUSED_EXTENSIONS,
        "guided_whitespace_pattern": "white space in JSON is bounded here as it is",
        "structural_tag": "use tools",
    }

    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Grammar | None = None
    guided_choice: Choices | None = None
    guided_grammar: Grammar | None = Field(None, description="Lark's, as llguidance reads it, or GBNF.")
    json_schema: Schema | None = Field(None, description="llama.cpp's name for guided_json.")
    grammar: Grammar | None = Field(None, description="llama.cpp's name for guided_grammar.")

    def form(self) -> Form:
        """The one form that is asked for. Raises `ApiError` (400) where there are several."""
        new = self.structured_outputs or StructuredOutputs()
        schemas = {
            "structured_outputs.json": new.json_,
            "structured_outputs.json_object": {} if new.json_object else None,
            "guided_json": self.guided_json,
            "json_schema": self.json_schema,
        }
        guides = {
            "structured_outputs.regex": (GuideKind.REGEX, new.regex),
            "structured_outputs.choice": (GuideKind.CHOICE, new.choice),
            "structured_outputs.grammar": (GuideKind.GRAMMAR, new.grammar),
            "guided_regex": (GuideKind.REGEX, self.guided_regex),
            "guided_choice": (GuideKind.CHOICE, self.guided_choice),
            "guided_grammar": (GuideKind.GRAMMAR, self.guided_grammar),
            "grammar": (GuideKind.GRAMMAR, self.grammar),
        }
        forms = {name: Form(schema=_schema(name, value)) for name, value in schemas.items() if value is not None}
        for name, (kind, value) in guides.items():
            if value:
                forms[name] = Form(guide=Guide(kind, (value,) if isinstance(value, str) else tuple(value)))
        if len(forms) > 1:
            first, second, *_ = forms
            raise ApiError(400, f"{second}: {first} says already what the answer must be", param=second)
        return next(iter(forms.values()), Form())


def _schema(name: str, given: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema, which may be the text of one."""
    if not isinstance(given, str):
        return given
    try:
        schema = json.loads(given)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise ApiError(400, f"{name}: it must be a JSON schema, an object or the text of one", param=name)
    return schema
