"""Grammars put together: one after the reasoning, one or the other."""

import math

import torch
from torch import Tensor

from kvist.base.errors import RequestError
from kvist.runtime.request import Grammar
from kvist.text.detokenizer import Detokenizer
from kvist.text.tokenizer import Tokenizer


class AfterReasoning:
    """A grammar for what follows a model's reasoning, which is free. `closing`: the text that ends it.

    `opening`: a token by which the model may begin to reason as its first; None: it does so already. An answer that
    does not begin with it follows the grammar from its first token on. What stands behind `closing` in the token that
    completes it follows the grammar already, but for whitespace before it. `must_come`: what follows is not left out,
    so no token that ends a text may come before it.
    """

    def __init__(
        self, grammar: Grammar, tokenizer: Tokenizer, closing: str, opening: int | None, must_come: bool
    ) -> None:
        self._grammar = grammar
        self._ends = sorted(tokenizer.eos_ids) if must_come else []
        self._tokenizer = tokenizer
        self._closing = closing
        self._opening = opening
        self._first = opening is not None
        self._reasons = opening is None
        self._text = Detokenizer(tokenizer, skip_special=False)
        self._heard = ""  # the end of the reasoning, as far as `closing` may have begun in it
        self._width = 0  # of the logits

    def forbid(self, logits: Tensor) -> None:
        if self._reasons:
            self._width = len(logits)
            logits[[token for token in self._ends if token < self._width]] = -math.inf
            return
        if not self._first or self._opening is None:
            self._grammar.forbid(logits)
            return
        opening = logits[self._opening].item()
        self._grammar.forbid(logits)
        logits[self._opening] = opening

    def accept(self, token: int) -> None:
        if self._reasons:
            before, closed, after = (self._heard + self._text.push(token)).partition(self._closing)
            self._heard, self._reasons = before[-len(self._closing) :], not closed
            self._follow(after.lstrip())
        elif self._first and token == self._opening:
            self._reasons = True
        else:
            self._grammar.accept(token)
        self._first = False

    @property
    def ended(self) -> bool:
        return not self._reasons and not self._first and self._grammar.ended

    def _follow(self, text: str) -> None:
        """Hold a text to the grammar, token by token. Raises `RequestError` when it does not follow it."""
        for token in self._tokenizer.encode(text, add_special=False) if text else ():
            self._grammar.forbid(torch.zeros(self._width))
            self._grammar.accept(token)


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
            if not self._left:
                raise RequestError("the grammar of this request failed: a token came that neither half of it allows")
        for grammar in self._left:
            grammar.accept(token)

    @property
    def ended(self) -> bool:
        return all(grammar.ended for grammar in self._left)
