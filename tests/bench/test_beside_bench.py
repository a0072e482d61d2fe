"""Beside other engines: workers that answer, die, hang or lie; turns; what is compared."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvist.base.errors import KvistError
from kvist.bench import beside
from kvist.bench.beside import What
from kvist.bench.gguf_models import random_gguf
from kvist.bench.machine import Samples
from kvist.bench.peers import engines
from kvist.bench.peers.engines import LLAMA_CPP, Setting
from kvist.bench.peers.worker import PeerError, Worker
from kvist.bench.report import Report
from kvist.bench.shapes import Shape
from kvist.cli.app import app
from kvist.models.families import read_config
from kvist.models.gguf import config_of, parts_of
from kvist.models.load import load
from kvist.models.plain import PlainActivations
from kvist.service.loaded import open_model
from kvist.weights.gguf import GgufCheckpoint
from kvist.weights.gguf_header import read_header

SETTINGS = engines.SETTINGS[LLAMA_CPP]
FAKE = """
import json, sys, time
first = json.loads(sys.stdin.readline())
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "fill":
        print("{}", flush=True)
    elif first["mood"] == "lies":
        print(json.dumps({"seconds": -1}), flush=True)
    elif first["mood"] == "babbles":
        print("what?", flush=True)
    elif first["mood"] == "hangs":
        time.sleep(60)
    elif first["mood"] == "dies":
        sys.exit("out of memory")
    else:
        print(json.dumps({"seconds": command["tokens"] / 1000}), flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return str(path)


def worker(script: str, mood: str = "well") -> Worker:
    return Worker("fake", Path(sys.executable), script, {"mood": mood}, 30)


def test_a_worker_answers(script: str) -> None:
    with contextlib.closing(worker(script)) as peer:
        assert peer.ask("fill", 100) == 0
        assert peer.ask("decode", 4) == 0.004
        assert peer.ask("prefill", 512) == 0.512


@pytest.mark.parametrize(
    ("mood", "reason"),
    [("lies", "answers -1 seconds"), ("babbles", "answers b'what"), ("hangs", "within 0.2"), ("dies", "out of memory")],
)
def test_a_worker_that_fails_is_told_in_one_line(mood: str, reason: str, script: str) -> None:
    with contextlib.closing(worker(script, mood)) as peer, pytest.raises(PeerError, match=reason):
        peer.ask("decode", 4, timeout=0.2 if mood == "hangs" else 30)


def test_a_worker_that_does_not_come_up(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("raise SystemExit('no such module')")
    with pytest.raises(PeerError, match="no such module"):
        worker(str(path))


class Fake:
    """A worker whose speed is known."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked, self.closed = seconds, list[tuple[str, int]](), False

    def ask(self, do: str, tokens: int) -> float:
        self.asked.append((do, tokens))
        return 0.0 if do == "fill" else self.seconds

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[Setting, Fake]:
    """llama.cpp's settings, each half as fast as the one before it, beside the bundled model."""
    made = {setting: Fake(0.5 * 2**number) for number, setting in enumerate(SETTINGS)}

    @contextlib.contextmanager
    def workers(shape: str, weights: str, most: int, pythons: Any, observe: Any) -> Any:
        yield dict(made)

    monkeypatch.setattr(beside, "_workers", workers)
    loaded = open_model(None)
    monkeypatch.setattr(beside, "_models", lambda shape, weights, kvs: [loaded.with_kv(kv) for kv in kvs])
    return made


def measured(what: What, shape: str, lengths: list[int], kvs: list[str]) -> Report:
    return beside.run(what, [shape], [beside.IK_WEIGHTS], lengths, kvs, 3, {}, lambda what: None)


def test_what_is_compared(fakes: dict[Setting, Fake]) -> None:
    report = measured(What.DECODE, beside.IK_SHAPE, [128, 0], ["fp32", "turbo4"])
    first = fakes[SETTINGS[0]]
    assert [asked for asked in first.asked if asked[0] == "fill"] == [("fill", 0), ("fill", 128)]
    assert first.asked.count(("decode", beside.STEPS)) == 2 * 4, (
        "three rounds and one that does not count, at each length"
    )
    at_start = [row for row in report.rows if row.context == 0]
    speeds = {(row.engine, row.kv): row.value for row in at_start}
    assert speeds[LLAMA_CPP, SETTINGS[0].label] == 2
    assert speeds["ik_llama.cpp, scaled", "its best"] == pytest.approx(2 * 258 / 186)
    for kv in ("fp32", "turbo4"):
        ratio = next(r for r in report.ratios if r.a == f"kvist {kv}" and r.what.endswith(" 0"))
        assert ratio.b == f"{LLAMA_CPP} {SETTINGS[0].label}"
        assert ratio.value == pytest.approx(0.5 * speeds["kvist", kv], rel=0.5)
    assert report.machine["read_gb_s"] > 0
    # Half as fast as the best is far behind: not filled any further.
    later = [row for row in report.rows if row.context == 128 and row.engine == LLAMA_CPP]
    assert [row.kv for row in later] == [SETTINGS[0].label]
    assert all(fakes[setting].closed for setting in SETTINGS[1:])
    assert not any("ik_llama" in row.engine for row in report.rows if row.context == 128), "there is no figure of it"


def test_whole_prompts(fakes: dict[Setting, Fake]) -> None:
    report = measured(What.PREFILL, "some", [70], ["fp32"])
    speeds = {row.engine: row.value for row in report.rows if row.kv in ("fp32", SETTINGS[0].label)}
    assert speeds[LLAMA_CPP] == pytest.approx(70 / 0.5)
    assert speeds["kvist"] > 0
    assert isinstance(report, Report)


def test_turns_go_there_and_back() -> None:
    order = list[str]()

    def call(name: str) -> float:
        order.append(name)
        return 1.0

    class Quiet:
        def read(self) -> None:
            order.append("read")

    asked = {SETTINGS[0]: lambda: call("theirs")}
    mine, theirs, reads = beside._turns({"kv": lambda: call("ours")}, asked, Quiet(), 2)
    assert order == ["read", "theirs", "ours", "ours", "theirs", "read", "read", "theirs", "ours"]
    assert (len(mine["kv"].values), len(theirs[SETTINGS[0]].values), len(reads)) == (2, 2, 2)
    assert isinstance(mine["kv"], Samples)


def test_without_the_other_engine(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="make bench-peers"):
        engines.python_of(LLAMA_CPP, tmp_path)
    result = CliRunner().invoke(app, ["bench", "prefill", "--peers", str(tmp_path)])
    assert "make bench-peers" in str(result.exception)
    result = CliRunner().invoke(app, ["bench", "decode", "--peer", "martian"])
    assert isinstance(result.exception, KvistError)
    assert "martian" in str(result.exception)


def test_the_same_random_weights_in_both_formats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = Shape("tiny", 2, 64, 96, 4, 2, 16, 128, tied=True)
    for module in ("models", "gguf_models"):
        monkeypatch.setattr(f"kvist.bench.{module}.shape_named", lambda name: tiny)
    for module in ("kvist.bench.models", "kvist.service.gguf", "kvist.service.packing"):
        monkeypatch.setattr(f"{module}.writable_cache_folder", lambda: tmp_path)
    monkeypatch.setattr("kvist.bench.models.write_tokenizer", lambda directory, vocab: None)
    monkeypatch.setattr("kvist.service.gguf._vocabulary", lambda header: pytest.fail("it has a made-up one"))
    path = random_gguf("tiny", "bf16")
    plain = open_model(str(path.parent))
    assert path == random_gguf("tiny", "bf16")
    header = read_header(path)
    config = replace(read_config(config_of(header), "x"), max_positions=plain.config.max_positions)
    model = load(GgufCheckpoint(header, parts_of(header, config)), config, PlainActivations(), torch.bfloat16)
    for name, weight in plain.model.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], weight), name
