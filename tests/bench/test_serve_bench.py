"""The serving benchmark measures what it says: on a tiny model, against counts made in another way."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from kvist.base.errors import KvistError
from kvist.bench.agent import Session, necessary
from kvist.bench.client import Answer, percentiles
from kvist.bench.serve import ServeReport, measure_agent, run
from kvist.bench.trace_replay import BLOCK, read_trace
from kvist.bench.vocabulary import END, synthetic_tokenizer
from kvist.service.loaded import Loaded, open_model
from kvist.text.tokenizer import Tokenizer
from tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return open_model(str(write_tiny_model(tmp_path_factory.mktemp("bench") / "tiny")))


def answer(prompt: list[int], tokens: list[int]) -> Answer:
    return Answer(prompt, 0.0, tokens, [0.0] * len(tokens))


def test_what_is_necessary_is_counted_to_the_token() -> None:
    answers = [
        answer([1, 2, 3, 4], [5, 6]),  # all of it: 4, and one token of the answer
        answer([1, 2, 3, 4, 5, 6, 7], [8]),  # 5 was computed, 6 was only drawn: 6 and 7
        answer([1, 2, 9], [1, 1, 1]),  # one, and two of the answer
        answer([1, 2, 3], [4]),  # at least the last token
        answer([2], [4]),
    ]
    assert necessary(answers) == [5, 2, 3, 1, 1]


def test_what_is_necessary_agrees_with_a_tree_of_tokens() -> None:
    rng = random.Random(1)
    answers = []
    for _ in range(40):
        base = answers[rng.randrange(len(answers))].prompt if answers and rng.random() < 0.7 else []
        prompt = [*base[: rng.randint(0, 12)], *(rng.randrange(3) for _ in range(rng.randint(1, 6)))]
        answers.append(answer(prompt, [rng.randrange(3) for _ in range(rng.randint(1, 5))]))
    tree: set[tuple[int, ...]] = set()
    counted = []
    for one in answers:
        written = [*one.prompt, *one.tokens[:-1]]
        places = [tuple(written[: end + 1]) for end in range(len(written))]
        last = len(one.prompt) - 1
        shared = next((place for place in range(len(one.prompt)) if places[place] not in tree), len(one.prompt))
        counted.append(len(written) - min(shared, last))
        tree.update(places)
    assert necessary(answers) == counted


def test_an_agents_session_computes_little_more_than_is_necessary(loaded: Loaded) -> None:
    report = measure_agent(loaded, 300, 2, 2, lambda text: None)
    shared = report.shared
    assert shared.requests == len(report.turns) == 2 + 2 * 2
    # Two that come at the same time may both compute the block in which they part.
    assert shared.necessary <= shared.computed <= shared.necessary + 2 * 64
    assert shared.cached_tokens == sum(row.cached for row in report.turns)
    assert shared.prompt_tokens - shared.cached_tokens + shared.new_tokens - shared.requests == shared.computed
    assert shared.hit_rate <= shared.ideal_hit_rate < 1
    assert shared.unshared > 1.5 * shared.computed
    main = [row for row in report.turns if row.thread == "main"]
    assert [row.cached for row in main][:1] == [0]
    assert all(row.cached >= before.prompt for before, row in pairwise(main))
    subagents = [row for row in report.turns if row.thread != "main" and row.turn == 0]
    assert all(row.cached >= 240 for row in subagents), "they begin with the same instructions"
    assert report.measured_unshared_s > 0


def test_a_session_longer_than_the_context_is_refused_before_it_begins(loaded: Loaded) -> None:
    with pytest.raises(KvistError, match=r"comes to [\d,]+ tokens and the context holds 2,048"):
        measure_agent(loaded, 3000, 2, 1, lambda text: None)


def test_a_session_is_the_same_for_the_same_seed_and_its_lengths_are_counted() -> None:
    one, two = Session.draw(1000, 10, 500), Session.draw(1000, 10, 500)
    assert one == two != Session.draw(1000, 10, 500, seed=1)
    assert len(one.main.start) == 1000
    assert len(one.main.turns) == 10
    assert one.longest < one.distinct < one.longest + sum(map(len, [t.start for t in one.subagents])) + 5000


def test_all_parts_are_reported_in_json_and_tables(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": 100 * n, "input_length": 700, "output_length": 3, "hash_ids": [1, n // 2]} for n in range(6)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = run(
        "tiny", loaded, ("structured",), prefix=100, turns=1, unshared=1, rounds=3, trace=trace, limit=5, scale=0.25,
        speed=10.0, watch=lambda text: None,
    )  # fmt: skip
    assert report.trace is not None
    assert report.trace.requests == 5
    assert report.trace.necessary <= report.trace.computed <= report.trace.necessary + 64
    # Blocks of 128 tokens, prompts of 175: two distinct tails twice and a third once behind one block.
    assert report.trace.prompt_tokens == 5 * 175
    assert report.structured is not None
    assert report.structured.valid == report.structured.answers == 16
    assert 0 < report.structured.share < 1
    found = json.loads(json.dumps(report.to_json()))
    assert found["rates"]["trace"]["over_necessary"] == report.trace.computed / report.trace.necessary
    report.print(Console(width=160))
    assert "16 of 16 answers valid" in capsys.readouterr().out
    assert isinstance(report, ServeReport)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nothing", "line 2 is no JSON"),
        ("[1]", "line 2 is no JSON object"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 1, "hash_ids": [1]}', "timestamp should be a number"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1, "hash_ids": []}', "input_length should be a number"),
        ('{"timestamp": 1, "input_length": 5, "output_length": true, "hash_ids": [1]}', "output_length should be"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": ["x"]}', "hash_ids should be a list"),
        ('{"timestamp": 1, "input_length": 513, "output_length": 1, "hash_ids": [1]}', "513 tokens are 2 blocks"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 1, "hash_ids": [1]}', "timestamp should be a number"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_trace_that_is_none_is_refused_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    good = '{"timestamp": 5, "input_length": 512, "output_length": 1, "hash_ids": [7]}'
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(KvistError, match=said):
        read_trace(path)
    (arrival,) = read_trace(path, limit=1)
    assert (arrival.at, arrival.blocks) == (0.0, (7,))
    assert arrival.prompt(100, 1.0) == arrival.prompt(100, 1.0)
    assert len(arrival.prompt(100, 1.0)) == BLOCK
    with pytest.raises(KvistError, match="cannot read"):
        read_trace(tmp_path / "missing")


@pytest.mark.parametrize("size", [300, 49_152])
def test_a_vocabulary_of_any_size_reads_and_writes_every_text(size: int) -> None:
    tokenizer = Tokenizer(synthetic_tokenizer(size))
    assert tokenizer.vocab_size == size
    for text in ("hello, world", "Größe 日本 \n\t", "abcdefgh" * 5):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(END) == [size - 1]
    if size > 20_000:
        assert len(tokenizer.encode("kvistkvist")) < 6


def test_percentiles() -> None:
    assert percentiles([]) == (0.0, 0.0)
    assert percentiles([3.0]) == (3.0, 3.0)
    assert percentiles([float(value) for value in range(101)]) == (50.0, 99.0)
