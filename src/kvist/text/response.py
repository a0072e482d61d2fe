"""How a model writes reasoning and tool calls: the formats that are known, and which of them a checkpoint's is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvist.text.chat import ChatTemplate, tokenizer_config
from kvist.text.generic_tools import NAME as GENERIC
from kvist.text.response_calls import Tools
from kvist.text.response_formats import KNOWN, CallSyntax
from kvist.text.response_parser import ResponseParser
from kvist.text.response_parts import Content, Part, Reasoning, ToolCallArguments, ToolCallBegin, ToolCallEnd, joined
from kvist.text.response_template import Field, Kind, ResponseTemplate

__all__ = [
    "FORMATS",
    "CallSyntax",
    "Content",
    "Part",
    "Reasoning",
    "ResponseFormat",
    "ResponseParser",
    "ToolCallArguments",
    "ToolCallBegin",
    "ToolCallEnd",
    "joined",
]


@dataclass(frozen=True)
class ResponseFormat:
    """How a model writes: `template` is what its answers are read by, `calls` how calls are written, or None."""

    name: str
    template: ResponseTemplate
    calls: CallSyntax | None

    @classmethod
    def detect(cls, directory: Path, template: ChatTemplate | None) -> "ResponseFormat":
        """The format of a checkpoint: by the `response_template` in its tokenizer_config.json where there is one, else
        by what its chat template holds. Raises `ConfigError` for a response template that cannot be understood."""
        source = "" if template is None else template.source
        known = next(
            (
                FORMATS[name]
                for name, known in KNOWN.items()
                if any(all(text in source for text in texts) for texts in known.tells)
            ),
            FORMATS["plain"],
        )
        own = tokenizer_config(directory).get("response_template")
        if own is None:
            return known
        where = f"{directory / 'tokenizer_config.json'}: response_template"
        return cls("response_template", ResponseTemplate.read(own, where), known.calls)

    @property
    def reasoning(self) -> tuple[str, str] | None:
        """The texts that open and close reasoning, where it has such."""
        field = self._reasoning
        if field is None or field.open is None or field.close is None:
            return None
        opening, closing = field.open.literals, field.close.literals
        return (opening[0], closing[0]) if opening and closing else None

    @property
    def marked(self) -> bool:
        """Whether answers have markers, so that the text of special tokens is needed to read them."""
        return any(field.open is not None or field.close is not None for field in self.template.fields)

    def without_calls(self) -> "ResponseFormat":
        """The same, but what would be a call is text."""
        fields = tuple(field for field in self.template.fields if field.kind is not Kind.CALLS)
        return replace(self, template=replace(self.template, fields=fields), calls=None)

    def with_generic_calls(self) -> "ResponseFormat":
        """The same, with calls in the form of which `generic_tools` tells a model."""
        generic = FORMATS[GENERIC]
        reasoning = [field for field in self.template.fields if field.kind is Kind.REASONING]
        others = [field for field in generic.template.fields if field.kind is not Kind.REASONING]
        return ResponseFormat("generic", replace(self.template, fields=(*reasoning, *others)), generic.calls)

    def begun(self, prompt: str) -> str:
        """What of the answer the prompt already holds: all after the anchor; without an anchor, the marker that opens
        reasoning if the prompt ends with it, and the whitespace after."""
        if self.template.anchor is not None:
            end = self.template.anchor.last_end(prompt)
            return "" if end is None else prompt[end:]
        end = len(prompt.rstrip())
        openers = self._reasoning.open.literals if self._reasoning is not None and self._reasoning.open else ()
        opener = next((opener for opener in openers if prompt.endswith(opener, 0, end)), None)
        return "" if opener is None else prompt[end - len(opener) :]

    def parser(self, prompt: str = "", tools: Sequence[Mapping[str, Any]] = ()) -> ResponseParser:
        """A parser for one answer to `prompt`. `tools`, as chat templates take them, say what the arguments are that a
        model writes without quotes, and which calls count that no marker announces."""
        parser = ResponseParser(self.template, Tools(tools))
        parser.skip(self.begun(prompt))
        return parser

    @property
    def _reasoning(self) -> Field | None:
        return next((field for field in self.template.fields if field.kind is Kind.REASONING), None)


FORMATS: dict[str, ResponseFormat] = {
    name: ResponseFormat(name, ResponseTemplate.read(known.template, f"the format {name}"), known.calls)
    for name, known in KNOWN.items()
}
