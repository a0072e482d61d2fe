"""Grammars after reasoning, and one of two grammars."""

import math
from collections.abc import Callable

import pytest
import torch

from kvist.base.errors import RequestError
from kvist.runtime.request import Grammar
from kvist.service.constraints import AfterReasoning, Either
from kvist.text.grammar import GrammarCompiler
from kvist.text.tokenizer import Tokenizer
from kvist.text.training import train_bytes_bpe

END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = train_bytes_bpe("yes no yes no maybe yes", 270)
    backend.add_special_tokens([END])
    backend.add_tokens(["<think>", "</think>"])
    return Tokenizer(backend, [backend.token_to_id(END)])


@pytest.fixture(scope="module")
def choice(tokenizer: Tokenizer) -> Callable[..., Grammar]:
    grammars = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    return lambda *texts: grammars.choice(texts)()


def follows(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether a sequence may write `text` and end there."""
    end = next(iter(tokenizer.eos_ids))
    for token in [*tokenizer.encode(text), end]:
        row = torch.zeros(tokenizer.vocab_size)
        grammar.forbid(row)
        if row[token] == -math.inf:
            return False
        if token != end:
            grammar.accept(token)
    return True


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("yes", True),
        ("<think>anything < at all</think>yes", True),
        ("<think></think>no", True),
        ("maybe", False),
        ("<think>x</think>maybe", False),
        ("yes<think>", False),
    ],
)
def test_a_model_may_reason_before_it_follows_the_grammar(
    tokenizer: Tokenizer, choice: Callable[..., Grammar], text: str, allowed: bool
) -> None:
    opening = tokenizer.encode("<think>")[0]
    grammar = AfterReasoning(choice("yes", "no"), tokenizer, "</think>", opening, True)
    assert not grammar.ended
    assert follows(grammar, tokenizer, text) == allowed


@pytest.mark.parametrize(("text", "allowed"), [("hm </think>yes", True), ("hm</think>maybe", False)])
def test_reasoning_that_has_begun_is_free_until_it_is_closed(
    tokenizer: Tokenizer, choice: Callable[..., Grammar], text: str, allowed: bool
) -> None:
    assert follows(AfterReasoning(choice("yes", "no"), tokenizer, "</think>", None, True), tokenizer, text) == allowed


@pytest.mark.parametrize("must_come", [True, False])
@pytest.mark.parametrize("opens", [True, False])
def test_reasoning_does_not_end_the_answer_where_one_must_come(
    tokenizer: Tokenizer, choice: Callable[..., Grammar], opens: bool, must_come: bool
) -> None:
    opening = tokenizer.encode("<think>")[0] if opens else None
    grammar = AfterReasoning(choice("yes"), tokenizer, "</think>", opening, must_come)
    end = next(iter(tokenizer.eos_ids))
    seen = []
    for token in tokenizer.encode("<think>so</think>yes"[0 if opens else len("<think>") :]):
        row = torch.zeros(tokenizer.vocab_size)
        grammar.forbid(row)
        seen.append(row[end] > -math.inf)
        grammar.accept(token)
    row = torch.zeros(tokenizer.vocab_size)
    grammar.forbid(row)
    assert row[end] == 0, "it may end when the answer is complete"
    reasoning = seen[opens : -len(tokenizer.encode("yes"))]
    assert len(reasoning) > 1
    assert all(reasoning) != must_come
    assert any(reasoning) != must_come


def test_the_end_is_that_of_the_grammar(tokenizer: Tokenizer, choice: Callable[..., Grammar]) -> None:
    grammar = AfterReasoning(choice("yes", "no"), tokenizer, "</think>", None, True)
    for token in tokenizer.encode("so</think>"):
        grammar.accept(token)
        assert not grammar.ended
    for token in tokenizer.encode("yes"):
        grammar.accept(token)
    assert grammar.ended


@pytest.mark.parametrize(
    ("text", "allowed"), [("yes", True), ("yes no", True), ("no", True), ("no yes", False), ("maybe", False)]
)
def test_an_answer_follows_one_of_two_grammars(
    tokenizer: Tokenizer, choice: Callable[..., Grammar], text: str, allowed: bool
) -> None:
    grammar = Either(choice("yes no", "maybe not"), choice("yes", "no"))
    assert follows(grammar, tokenizer, text) == allowed


@pytest.fixture(scope="module")
def spelled() -> Tokenizer:
    """A vocabulary in which the end of reasoning is text, and runs on into what follows it."""
    backend = train_bytes_bpe("x</think>{yes} " * 20, 300)
    backend.add_special_tokens([END])
    backend.add_tokens(["</think>\n\n"])
    return Tokenizer(backend, [backend.token_to_id(END)])


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("x</think>{yes}", True),
        ("x</think>\n\n{yes}", True),  # whitespace within the token is let pass, and in one of its own is not
        ("x</think> {yes}", False),
        ("< </thin </think>{yes}", True),
        ("x</think>[no]", True),
        ("x</think>{no}", False),
        ("x</think>{{yes}", False),
    ],
)
def test_what_the_closing_token_holds_of_the_answer_follows_the_grammar(
    spelled: Tokenizer, text: str, allowed: bool
) -> None:
    grammars = GrammarCompiler(spelled, spelled.vocab_size)
    assert ">{" in [spelled.decode([token]) for token in spelled.encode("x</think>{yes}")], "the end, and the beginning"
    either = Either(grammars.choice(["{yes}", "{yet}"])(), grammars.choice(["[no]", "\n"])())
    assert follows(AfterReasoning(either, spelled, "</think>", None, True), spelled, text) == allowed
    with pytest.raises(RequestError, match="grammar of this request failed"):
        follows(AfterReasoning(grammars.choice(["yes"])(), spelled, "</think>", None, True), spelled, "x</think>{yes}")


def test_a_token_that_neither_grammar_allows_is_an_error(tokenizer: Tokenizer, choice: Callable[..., Grammar]) -> None:
    grammar = Either(choice("yes"), choice("no"))
    grammar.forbid(torch.zeros(tokenizer.vocab_size))
    with pytest.raises(RequestError, match="neither half"):
        grammar.accept(tokenizer.encode("<think>")[0])
