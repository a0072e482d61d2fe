"""What it costs to hold answers to a JSON schema: the grammar's share of the time of a step."""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvist.runtime.request import Grammar, Request, Sampling
from kvist.service.loaded import Loaded
from kvist.text.grammar import GrammarCompiler

STREAMS = 8
# What an agent might ask for: a record with texts, numbers, a choice and a list.
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 4, "maxLength": 40},
        "kind": {"enum": ["question", "command", "remark"]},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "steps": {
            "type": "array",
            "minItems": 2,
            "maxItems": 4,
            "items": {
                "type": "object",
                "properties": {
                    "path": {"type": "string", "minLength": 1, "maxLength": 30},
                    "line": {"type": "integer", "minimum": 1, "maximum": 9999},
                },
                "required": ["path", "line"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["title", "kind", "score", "steps"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Structured:
    """`compile_seconds`: of the schema, once; `vocabulary_seconds`: of the first grammar of all, which also reads the
    vocabulary. `grammar_seconds` of all `step_seconds`, over `tokens` tokens; `valid` of `answers` are JSON."""

    vocabulary_seconds: float
    compile_seconds: float
    grammar_seconds: float
    step_seconds: float
    tokens: int
    answers: int
    valid: int

    @property
    def share(self) -> float:
        return self.grammar_seconds / self.step_seconds


class _Timed:
    """A grammar that adds up the time it takes."""

    def __init__(self, grammar: Grammar, spent: list[float]) -> None:
        self._grammar = grammar
        self._spent = spent

    def forbid(self, logits: Tensor) -> None:
        start = time.perf_counter()
        self._grammar.forbid(logits)
        self._spent.append(time.perf_counter() - start)

    def accept(self, token: int) -> None:
        start = time.perf_counter()
        self._grammar.accept(token)
        self._spent.append(time.perf_counter() - start)

    @property
    def ended(self) -> bool:
        return self._grammar.ended


def measure(loaded: Loaded, rounds: int, watch: Callable[[str], None]) -> Structured:
    """`STREAMS` answers at once, `rounds` times, drawn from the model's own logits."""
    watch(f"{STREAMS} streams of JSON")
    tokenizer = loaded.tokenizer()
    grammars = GrammarCompiler(tokenizer, loaded.config.vocab_size)
    started = time.perf_counter()
    grammars.json_object()
    known = time.perf_counter()
    make = grammars.json_schema(SCHEMA)
    compiled = time.perf_counter()
    engine, rng, spent = loaded.engine(loaded.room(1024, STREAMS)), random.Random(0), list[float]()
    sequences, seconds = [], 0.0
    for number in range(rounds):
        for stream in range(STREAMS):
            prompt = tuple(rng.randrange(loaded.config.vocab_size) for _ in range(16))
            sampling = Sampling(temperature=1.0, seed=number * STREAMS + stream)
            request = Request(prompt, 900, sampling, tokenizer.eos_ids, grammar=lambda: _Timed(make(), spent))
            sequences.append(engine.add(request))
        before = time.perf_counter()
        while not engine.idle:
            engine.step()
        seconds += time.perf_counter() - before
    return Structured(
        vocabulary_seconds=known - started,
        compile_seconds=compiled - known,
        grammar_seconds=sum(spent),
        step_seconds=seconds,
        tokens=sum(len(sequence.new_tokens) for sequence in sequences),
        answers=len(sequences),
        valid=sum(_is_valid(tokenizer.decode(sequence.new_tokens)) for sequence in sequences),
    )


def _is_valid(text: str) -> bool:
    try:
        return set(SCHEMA["required"]) <= set(json.loads(text))  # type: ignore[arg-type]
    except ValueError:
        return False
