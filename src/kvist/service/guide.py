"""What a text must be, other than JSON of a schema."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from kvist.runtime.request import Grammar
from kvist.text.grammar import GrammarCompiler


class GuideKind(StrEnum):
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True)
class Guide:
    """What a text must be, other than JSON: what all of a regular expression matches, one of some texts, or what a
    context-free grammar (Lark's or GBNF) makes."""

    kind: GuideKind
    texts: tuple[str, ...]

    def grammar(self, grammars: GrammarCompiler) -> Callable[[], Grammar]:
        """Raises `RequestError` for one that cannot be followed."""
        match self.kind:
            case GuideKind.CHOICE:
                return grammars.choice(self.texts)
            case GuideKind.REGEX:
                return grammars.regex(self.texts[0])
            case GuideKind.GRAMMAR:
                return grammars.lark(self.texts[0])
