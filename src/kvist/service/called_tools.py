"""The tools that an answer may call, as far as a grammar holds their arguments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from kvist.base.errors import RequestError
from kvist.runtime.request import Grammar
from kvist.text.call_grammar import CalledTool
from kvist.text.grammar import GrammarCompiler
from kvist.text.response import ResponseFormat

_ANY: Mapping[str, Any] = MappingProxyType({"type": "object"})


@dataclass
class CalledTools:
    """Collects them. A strict one is held to the letter. Of others, where a call is `required` as much is held as can
    be; else the form of a call alone: the model decides whether to make one."""

    grammars: GrammarCompiler
    required: bool
    _tools: list[CalledTool] = field(default_factory=list)
    _unheld: list[str] = field(default_factory=list)

    @property
    def unheld(self) -> tuple[str, ...]:
        """What is left to the client, in words."""
        return tuple(self._unheld)

    def add(self, name: str, parameters: Mapping[str, Any], strict: bool, place: str | None) -> None:
        """One more tool. Raises `RequestError` that names it, and the `place` of its schema, where that is strict and
        cannot be held."""
        if strict:
            try:
                held = self.grammars.strict(parameters)
            except RequestError as error:
                raise RequestError(f"the strict tool {name!r}: {error}", place) from None
            self._tools.append(CalledTool(name, held, True, place))
        elif self.required:
            held, dropped = self.grammars.relaxed(parameters)
            if dropped:
                self._leave(name, ", ".join(dropped))
            self._tools.append(CalledTool(name, held, False, place))
        else:
            self._tools.append(CalledTool(name, _ANY, False, place))

    def grammar(self, form: ResponseFormat, alone: bool, parallel: bool) -> Callable[[], Grammar]:
        """The grammar of calls; `alone`: the answer is nothing else. Raises `RequestError` as
        `GrammarCompiler.tool_calls` does."""
        try:
            return self.grammars.tool_calls(form, self._tools, required=alone, parallel=parallel)
        except RequestError:
            loose = [tool for tool in self._tools if not tool.strict and tool.parameters is not _ANY]
            if not loose:
                raise
        less = [tool if tool.strict else CalledTool(tool.name, _ANY, False, tool.place) for tool in self._tools]
        calls = self.grammars.tool_calls(form, less, required=alone, parallel=parallel)
        for tool in loose:
            self._leave(tool.name, "the schema as a whole")
        return calls

    def _leave(self, name: str, what: str) -> None:
        self._unheld.append(f"the arguments of {name!r} were not held to all of its schema; left to the client: {what}")
