"""The needle stands where it should; a model that can copy finds it, and loses it with its cache."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from torch import Tensor

from kvist.base.errors import RequestError, TextError
from kvist.cache.view import PagedView
from kvist.evals.needle import DEPTHS, QUESTION, WORDS, Haystack, NeedleEval, NeedleReport, _ask, plot
from kvist.runtime.feed import feed
from kvist.service.loaded import RECALL, Loaded, open_model
from kvist.text.reading import read_text
from kvist.text.recall import VOCAB_SIZE
from kvist.text.tokenizer import Tokenizer
from kvist.text.training import save_tokenizer, train_bytes_bpe, train_characters

NAMES = ["Anna", "Boris", "Clara", "Denis", "Elena"]
STORY = "".join(f"Then {name} went to see {other}.\n" for name in NAMES for other in NAMES) * 12


def _word_tokenizer() -> Backend:
    """As many words as the recall task has tokens: those of the needle, and w1, w2, ... A text begins with id 0."""
    words = [*QUESTION.split(), ".", *WORDS]
    vocabulary = ["<begin>", "<query>", *words]
    vocabulary += [f"w{number}" for number in range(VOCAB_SIZE - len(vocabulary))]
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<query>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<begin>", "<query>"])
    backend.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 0)])
    return backend


@pytest.fixture(scope="module")
def copier(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The recall model reads words: it has learned to copy what stood behind an earlier token of the same id."""
    directory = Path(shutil.copytree(RECALL, tmp_path_factory.mktemp("models") / "copier"))
    save_tokenizer(_word_tokenizer(), directory)
    return open_model(str(directory), kv="fp32")


@pytest.fixture(scope="module")
def haystack(copier: Loaded) -> Haystack:
    """Of words that hardly repeat; numbers of different digits, since a digit twice has two tokens behind it."""
    chooser = random.Random(0)
    words = [chooser.choice([f"w{chooser.randrange(480)}"] * 9 + ["."]) for _ in range(1200)]
    for seed in range(1000):
        found = Haystack(copier.tokenizer(), " ".join(words), seed)
        if all(len(set(found.trial(length, 0, None).answer)) == 5 for length in (256, 768)):
            return found
    raise AssertionError("every number has a digit twice")


@pytest.mark.parametrize("spelling", ["digits", "words"])
@pytest.mark.parametrize("depth", [None, *DEPTHS])
def test_the_needle_stands_at_its_depth_behind_a_sentence(spelling: str, depth: float | None) -> None:
    letters = STORY + QUESTION + "".join(WORDS)
    tokenizer = Tokenizer(train_bytes_bpe(STORY, 300) if spelling == "digits" else train_characters(letters))
    haystack = Haystack(tokenizer, STORY, seed=4)
    assert haystack.spelling == spelling
    trial = haystack.trial(700, 2, depth)
    assert len(trial.context) + len(trial.question) + len(trial.answer) == 700
    context, question, answer = (tokenizer.decode(part) for part in (trial.context, trial.question, trial.answer))
    number = answer.strip()
    assert question + answer == f"{QUESTION} {number}"
    assert number.isdigit() if spelling == "digits" else set(number.split()) <= set(WORDS)
    assert len(number) == 5 if spelling == "digits" else len(number.split()) == 5
    sentence = f"{QUESTION} {number}."
    if depth is None:
        assert QUESTION not in context
        assert context in STORY
        return
    before, after = context.split(sentence)
    assert before + after in STORY
    assert before == "" or before.rstrip(" ").endswith((".", "\n"))
    assert after == "" or after.endswith((".", "\n"))
    # Not farther from where it should be than half a sentence, in characters as well as in tokens.
    assert len(before) == pytest.approx(depth * len(before + after), abs=40)


def test_trials_are_decided_by_seed_length_and_number() -> None:
    tokenizer = Tokenizer(train_bytes_bpe(STORY, 300))
    ours, same, other = (Haystack(tokenizer, STORY, seed) for seed in (1, 1, 2))
    assert ours.trial(300, 0, 0.5) == same.trial(300, 0, 0.5)
    assert len({tuple(trial.answer) for trial in (ours.trial(300, 0, 0.5), ours.trial(300, 1, 0.5))}) == 2
    assert ours.trial(300, 0, 0.5).answer == ours.trial(300, 0, None).answer
    assert ours.trial(300, 0, 0.5).answer != other.trial(300, 0, 0.5).answer


def test_what_begins_every_text_begins_a_trial(haystack: Haystack) -> None:
    trial = haystack.trial(256, 0, 0.0)
    assert trial.context[0] == 0
    assert 0 not in trial.context[1:] + trial.question + trial.answer
    assert len(trial.context) + len(trial.question) + len(trial.answer) == 256


def test_a_model_that_copies_finds_the_needle(copier: Loaded, haystack: Haystack) -> None:
    row = NeedleEval(haystack, 1024, (256, 768), trials=1).score(copier, "fp32")
    assert [(cell.length, cell.depth) for cell in row.cells] == [(n, depth) for n in (256, 768) for depth in DEPTHS]
    assert all(cell.exact == 1.0 for cell in row.cells)
    assert all(cell.gain > 10 for cell in row.cells)
    assert all(cell.log_probability > -1 for cell in row.cells)
    # All but the question of seven tokens and the answer of five.
    assert [cell.cached_tokens for cell in row.cells] == [256 - 12] * 5 + [768 - 12] * 5
    assert row.gain == pytest.approx(row.log_probability - row.log_probability_without)


def test_exactness_is_that_of_greedy_decoding(copier: Loaded, haystack: Haystack) -> None:
    runner = copier.engine(copier.room(256)).runner

    def next_logits(tokens: list[int]) -> Tensor:
        lease = runner.manager.open()
        logits = feed(runner, lease, tokens, 1)[0]
        runner.manager.release(lease)
        return logits

    for depth in (None, 0.5):
        trial = haystack.trial(256, 0, depth)
        prompt = trial.context + trial.question
        drawn: list[int] = []
        for _ in trial.answer:
            drawn.append(int(next_logits(prompt + drawn).argmax()))
        chances = [
            next_logits(prompt + trial.answer[:place]).double().softmax(-1)[token]
            for place, token in enumerate(trial.answer)
        ]
        asked = _ask(runner, trial)
        assert asked.exact == (drawn == trial.answer) == (depth is not None)
        assert asked.log_probability == pytest.approx(sum(math.log(chance) for chance in chances))


def test_with_the_cache_the_needle_is_lost(copier: Loaded, haystack: Haystack, monkeypatch: pytest.MonkeyPatch) -> None:
    """With keys that are all the same a model attends to everything alike, and the needle is one word in hundreds."""
    write = PagedView.write
    monkeypatch.setattr(PagedView, "write", lambda self, k, v: write(self, torch.zeros_like(k), v))
    row = NeedleEval(haystack, 1024, (256,), trials=1).score(copier, "one key")
    assert row.exact == 0.0
    assert row.gain < 5


def test_lengths_that_do_not_fit_are_refused(haystack: Haystack) -> None:
    assert NeedleEval(haystack, 1024)._lengths == [256, 512, 1024]
    assert NeedleEval(haystack, 100)._lengths == [100]
    with pytest.raises(RequestError, match="context has 512 tokens; 1,024 do not fit"):
        NeedleEval(haystack, 512, (1024,))
    with pytest.raises(RequestError, match="the text has 1,200 tokens; 2,000 were asked for"):
        NeedleEval(haystack, 4096, (2000,))
    with pytest.raises(RequestError, match="20 tokens are too short"):
        haystack.trial(20, 0, 0.5)


def test_texts_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="'q' is not among"):
        Haystack(Tokenizer(train_characters(STORY + QUESTION)), "q")
    with pytest.raises(TextError, match="is not among"):
        Haystack(Tokenizer(train_characters("abc ")), "abc")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for path, said in {"latin": "byte 3", "missing": "No such file", ".": "directory"}.items():
        with pytest.raises(TextError, match=said):
            read_text(tmp_path / path)


def test_json_and_picture(copier: Loaded, haystack: Haystack, tmp_path: Path) -> None:
    row = NeedleEval(haystack, 1024, (256,), trials=1).score(copier, "fp32")
    report = NeedleReport("copier", "words", haystack.spelling, [row])
    answer = json.loads(json.dumps(report.to_json()))
    assert (answer["model"], answer["text"], answer["spelling"]) == ("copier", "words", "words")
    measures = {"exact", "log_probability", "log_probability_without", "gain"}
    assert set(answer["rows"][0]) == {"kv", "bits_per_value", "bytes_per_token", "cells"} | measures
    assert set(answer["rows"][0]["cells"][0]) == {"length", "depth", "trials", "cached_tokens"} | measures
    plot(report, tmp_path / "needle.png")
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")
