"""What a restart costs: the time to the first token of a prompt that was computed before, in a process of its own.

Each life is a new process over one folder: `cold` computes the prompt, `restart` finds it on disk, `no page cache` does
after the system was made to forget the files, `import` in a fresh folder into which a context was imported. All of
them must come to the same logits, bit for bit. `writing` measures what writing behind takes from decoding; `isolation`,
whether a tenant can tell by the time what another has asked."""

import dataclasses
import hashlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvist.base.errors import KvistError
from kvist.base.units import format_bytes, format_duration
from kvist.bench.machine import Memory, facts, interleave
from kvist.bench.models import random_model
from kvist.bench.report import Ratio, Report, Row
from kvist.runtime.engine import Engine
from kvist.runtime.request import Request, Sampling
from kvist.service.context_check import Check
from kvist.service.context_file import export_context, import_context
from kvist.service.contexts import TEXT, Contexts, describe, finish
from kvist.service.keeping import KeepSettings, open_kept
from kvist.service.loaded import Loaded

PARTS = ("restart", "writing", "isolation")
STREAMS = 8
_PROMPT = 16
_ISOLATION = 256  # tokens
_DISK = 1 << 40
_SEED = 5


@dataclass(frozen=True)
class Life:
    """One process. `logits`: digest of every row it drew from. `hits`: blocks read, by tier. Times in seconds: `start`
    until the model could be asked, `first` from the request to its first token."""

    name: str
    start: float
    first: float
    logits: str
    computed: int
    hits: dict[str, int]
    kept_bytes: int


@dataclass(frozen=True)
class Isolation:
    """Medians of the seconds to the first token of prompts that the tenant itself, another, or nobody had asked before.

    `another_told`: how often, of all pairs, nobody's took longer than another's: one half where the time tells nothing.
    `own_told`: the same of its own, which shows that the time could tell. `chance`: twice the standard deviation of
    such a share where there is no difference (Mann and Whitney)."""

    tokens: int
    trials: int
    own: float
    another: float
    nobody: float
    another_told: float
    own_told: float
    chance: float


@dataclass
class RestartReport:
    """`to_json` is documented in docs/json.md."""

    shape: str
    kv: str
    prefix: int
    machine: dict[str, str | float]
    lives: list[Life] = field(default_factory=list)
    exported_bytes: int | None = None
    import_s: float | None = None
    writing: Report | None = None
    isolation: Isolation | None = None

    @property
    def same_bits(self) -> bool:
        return len({life.logits for life in self.lives}) <= 1

    def speedup(self, life: Life) -> float:
        """How many times sooner its first token came than that of the cold one."""
        return self.lives[0].first / life.first

    def to_json(self) -> dict[str, object]:
        found = dataclasses.asdict(self)
        for life, shown in zip(self.lives, found["lives"], strict=True):
            shown["speedup"] = self.speedup(life)
        return found | {"same_bits": self.same_bits}

    def print(self, console: Console) -> None:
        """Tables for people."""
        if self.lives:
            table = Table("", "start", "first token", "sooner", "computed", "blocks read", "logits", box=None)
            for life in self.lives:
                hits = ", ".join(f"{count:,} from {tier}" for tier, count in life.hits.items()) or "none"
                first = f"{life.first:.2f}s" if life.first < 60 else format_duration(life.first)
                row = (f"{life.start:.1f}s", first, f"{self.speedup(life):.1f}x", f"{life.computed:,}", hits)
                table.add_row(life.name, *row, life.logits[:12])
            console.print(f"{self.shape} · KV {self.kv} · a prompt of {self.prefix:,} tokens")
            console.print(table)
            kept = max(life.kept_bytes for life in self.lives)
            verdict = "the same bits in every life" if self.same_bits else "THE LOGITS DIFFER"
            console.print(f"{format_bytes(kept)} on disk · {verdict}")
            if self.exported_bytes is not None and self.import_s is not None:
                size = format_bytes(self.exported_bytes)
                console.print(f"exported as one file of {size}, imported in {format_duration(self.import_s)}")
        if self.writing is not None:
            self.writing.print(console)
        if (found := self.isolation) is not None:
            own, another, nobody = (f"{seconds * 1e3:.0f}ms" for seconds in (found.own, found.another, found.nobody))
            console.print(
                f"first token of a prompt of {found.tokens} tokens, medians of {found.trials}: that the tenant asked "
                f"before {own}, that another did {another}, that nobody did {nobody}"
            )
            console.print(
                f"which of two is slower is told by the time: nobody's or another's {found.another_told:.1%} "
                f"(chance: 50 ± {found.chance:.1%}), nobody's or its own {found.own_told:.1%}"
            )


def run(
    shape: str,
    kv: str | None,
    parts: Sequence[str],
    prefix: int,
    tokens: int,
    rounds: int,
    watch: Callable[[str], None],
) -> RestartReport:
    """Measure `parts`. `prefix`: tokens of the prompt; `tokens`: new ones of each stream of `writing`."""
    loaded = random_model(shape, "bf16", kv)
    report = RestartReport(shape, loaded.layout.kv, prefix, facts())
    with tempfile.TemporaryDirectory(prefix="kvist-restart-") as name:
        folder = Path(name)
        if "restart" in parts:
            _restart(report, loaded, kv, folder, watch)
        if "writing" in parts:
            watch("decoding with and without writing behind")
            report.writing = measure_writing(shape, loaded, folder / "writing", tokens, rounds)
        if "isolation" in parts:
            watch("whether the time tells what another tenant has asked")
            report.isolation = measure_isolation(loaded, folder / "isolation", 6 * rounds)
    return report


def _restart(report: RestartReport, loaded: Loaded, kv: str | None, folder: Path, watch: Callable[[str], None]) -> None:
    lived = folder / "lived"

    def live(name: str, where: Path) -> None:
        watch(f"{name}: a prompt of {report.prefix:,} tokens")
        asked = {"name": name, "shape": report.shape, "kv": kv, "prefix": report.prefix, "folder": str(where)}
        command = [sys.executable, "-m", "kvist.bench.restart", json.dumps(asked)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise KvistError(f"the process {name!r} failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
        report.lives.append(Life(**json.loads(done.stdout)))

    live("cold", lived)
    live("restart", lived)
    _forget(lived)
    live("no page cache", lived)
    watch("export and import")
    report.exported_bytes, report.import_s = _carry_over(loaded, report.prefix, lived, folder / "imported")
    live("import", folder / "imported")


def _carry_over(loaded: Loaded, prefix: int, source: Path, target: Path) -> tuple[int, float]:
    """Export the prompt as a context, import it into a fresh folder; bytes of the file, and seconds of the import."""
    layout, file = loaded.layout, source.parent / "prompt.kvc"
    with open_kept(loaded, KeepSettings(source, _DISK)) as kept:
        tokens = prompt_of(loaded, prefix)
        context = describe("prompt", "", TEXT, "", tokens, (), kept.identity, layout.block_size, layout.block_bytes)
        finish(context, Contexts(source), kept.disk)
        export_context(context, kept.disk, file)
    started = time.perf_counter()
    with open_kept(loaded, KeepSettings(target, _DISK)) as kept:
        import_context(file, None, Contexts(target), kept.disk, kept.identity, loaded, check=Check.TRUST)
    return file.stat().st_size, time.perf_counter() - started


def _forget(folder: Path) -> None:
    """Have the operating system drop what it holds of the files."""
    for path in folder.rglob("*.kv"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def prompt_of(loaded: Loaded, tokens: int) -> tuple[int, ...]:
    """The prompt of every life."""
    rng = random.Random(_SEED)
    return tuple(rng.randrange(loaded.config.vocab_size) for _ in range(tokens))


def _live(name: str, shape: str, kv: str | None, prefix: int, folder: Path) -> Life:
    """One life, in this process."""
    started = time.perf_counter()
    loaded = random_model(shape, "bf16", kv)
    with open_kept(loaded, KeepSettings(folder, _DISK)) as kept:
        engine = loaded.engine(loaded.room(prefix + _PROMPT, prefixes=True), kept)
        digest = _noted(engine)
        ready = time.perf_counter()
        sequence = engine.add(Request(prompt_of(loaded, prefix), _PROMPT, Sampling(temperature=1.0, seed=_SEED)))
        while not engine.idle:
            engine.step()
        engine.check()
        first = sequence.times.first - sequence.times.added
        engine.keeper.flush(600)
        hits = dict(kept.cache.counters.hits)
        return Life(name, ready - started, first, digest.hexdigest(), engine.counters.computed, hits, kept.disk.used)


def _noted(engine: Engine) -> "hashlib._Hash":
    """A digest that takes in the logits of every step from now on."""
    digest, run = hashlib.sha256(), engine.runner.run

    def noted(works: object) -> list[Tensor]:
        found = run(works)  # type: ignore[arg-type]
        for rows in found:
            if len(rows):
                digest.update(rows.numpy().tobytes())
        return found

    engine.runner.run = noted  # type: ignore[method-assign, assignment]
    return digest


def measure_writing(shape: str, loaded: Loaded, folder: Path, tokens: int, rounds: int) -> Report:
    """Streams that decode, with and without a folder behind them, in turns. Whatever is not yet written at the end of a
    round is waited for, and counted."""
    rng, report, memory = random.Random(0), Report(facts()), Memory()

    def decode(engine: Engine) -> None:
        engine.runner.manager.tree.clear()
        for _ in range(STREAMS):
            prompt = tuple(rng.randrange(loaded.config.vocab_size) for _ in range(_PROMPT))
            engine.add(Request(prompt, tokens, Sampling(temperature=0.8, seed=rng.randrange(2**32))))
        while not engine.idle:
            engine.step()
        engine.keeper.flush(600)

    with open_kept(loaded, KeepSettings(folder, _DISK)) as kept:
        plain, behind = (
            loaded.engine(loaded.room(_PROMPT + tokens, STREAMS, prefixes=True), which) for which in (None, kept)
        )
        without, writing, read = interleave([lambda: decode(plain), lambda: decode(behind), memory.read], rounds)
        written = kept.cache.counters.written["disk"], kept.cache.counters.written_bytes["disk"]
    weights = loaded.model.weights
    for engine, seconds in (("memory", without), ("memory and disk", writing)):
        rate = seconds.map(lambda s: STREAMS * tokens / s)
        kv, context = loaded.layout.kv, _PROMPT + tokens
        what = f"decode, {STREAMS} streams"
        row = Row(what, engine, shape, weights, kv, context, STREAMS, rate.median, "tokens/s", rate.spread)
        report.rows.append(row)
    report.ratios.append(Ratio("decode", "memory and disk", "memory", without.over(writing).median))
    report.machine["read_gb_s"] = read.map(memory.gb_s).median
    report.machine["written_blocks"], report.machine["written"] = float(written[0]), format_bytes(written[1])
    return report


def measure_isolation(loaded: Loaded, folder: Path, trials: int) -> Isolation:
    """One tenant asks; then, in random order, another asks the same, something that nobody asked, and what it asked
    itself."""
    rng, length = random.Random(1), _ISOLATION
    seconds: dict[str, list[float]] = {"own": [], "another": [], "nobody": []}

    def prompt() -> tuple[int, ...]:
        return tuple(rng.randrange(loaded.config.vocab_size) for _ in range(length))

    with open_kept(loaded, KeepSettings(folder, _DISK)) as kept:
        engine = loaded.engine(loaded.room(6 * length, STREAMS, prefixes=True), kept)

        def ask(tokens: tuple[int, ...], tenant: str) -> float:
            sequence = engine.add(Request(tokens, 1, tenant=tenant))
            while not engine.idle:
                engine.step()
            engine.keeper.flush(600)
            return sequence.times.first - sequence.times.added

        for trial in range(trials + 1):
            prompts = {name: prompt() for name in seconds}
            ask(prompts["another"], "one")
            ask(prompts["own"], "two")
            for name in rng.sample(list(prompts), len(prompts)):
                found = ask(prompts[name], "two")
                if trial:  # the first one is not counted
                    seconds[name].append(found)

    def told(name: str) -> float:
        pairs = [(a > b) + (a == b) / 2 for a in seconds["nobody"] for b in seconds[name]]
        return sum(pairs) / len(pairs)

    own, another, nobody = (statistics.median(values) for values in seconds.values())
    chance = 2 * math.sqrt((2 * trials + 1) / (12 * trials * trials))
    return Isolation(length, trials, own, another, nobody, told("another"), told("own"), chance)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(dataclasses.asdict(_live(**asked | {"folder": Path(asked["folder"])}))))
