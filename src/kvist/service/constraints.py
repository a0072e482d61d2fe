"""Grammars put together: one after the reasoning, one or the other."""

from torch import Tensor

from kvist.runtime.request import Grammar
from kvist.text.detokenizer import Detokenizer
from kvist.text.stops import StopMatcher
from kvist.text.tokenizer import Tokenizer


class AfterReasoning:
    """A grammar for what follows a model's reasoning, which is free. `closing`: the text that ends it.

    `opening`: a token by which the model may begin to reason as its first; None: it does so already. An answer that
    does not begin with it follows the grammar from its first token on.
    """

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, closing: str, opening: int | None) -> None:
        self._grammar = grammar
        self._opening = opening
        self._first = opening is not None
        self._reasons = opening is None
        self._text = Detokenizer(tokenizer, skip_special=False)
        self._closing = StopMatcher((closing,))

    def forbid(self, logits: Tensor) -> None:
        if self._reasons:
            return
        if not self._first or self._opening is None:
            self._grammar.forbid(logits)
            return
        opening = logits[self._opening].item()
        self._grammar.forbid(logits)
        logits[self._opening] = opening

    def accept(self, token: int) -> None:
        if self._reasons:
            self._closing.push(self._text.push(token))
            self._reasons = self._closing.matched is None
        elif self._first and token == self._opening:
            self._reasons = True
        else:
            self._grammar.accept(token)
        self._first = False

    @property
    def ended(self) -> bool:
        return not self._reasons and not self._first and self._grammar.ended


class Either:
    """Two grammars, of which an answer follows one. It is known which as soon as only one allows a token."""

    def __init__(self, one: Grammar, other: Grammar) -> None:
        self._left = [one, other]
        self._allowed: list[Tensor] = []

    def forbid(self, logits: Tensor) -> None:
        if len(self._left) == 1:
            self._left[0].forbid(logits)
            return
        copies = [logits.clone() for _ in self._left]
        for grammar, copy in zip(self._left, copies, strict=True):
            grammar.forbid(copy)
        self._allowed = [copy > -float("inf") for copy in copies]
        logits.masked_fill_(~(self._allowed[0] | self._allowed[1]), -float("inf"))

    def accept(self, token: int) -> None:
        if len(self._left) > 1:
            allowing = zip(self._left, self._allowed, strict=True)
            self._left = [grammar for grammar, allowed in allowing if bool(allowed[token])]
        for grammar in self._left:
            grammar.accept(token)

    @property
    def ended(self) -> bool:
        return all(grammar.ended for grammar in self._left)
