"""A budget in bytes buys what it says, and is never exceeded."""

from pathlib import Path

import pytest
import torch

from kvist.base.errors import ConfigError
from kvist.cache.choice import parse_choice
from kvist.cache.layout import OPEN_BLOCKS, Layout, plan_layout
from kvist.cache.store import Store
from kvist.models.config import Activation, ModelConfig, Rope
from kvist.models.load import build, randomize
from kvist.service import budget as budget_module
from kvist.service.budget import free_memory, plan_budget
from kvist.service.loaded import Loaded, select_backend

CONFIG = ModelConfig(
    family="llama",
    vocab_size=61,
    hidden_size=64,
    intermediate_size=72,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=32,
    max_positions=8192,
    norm_eps=1e-5,
    activation=Activation.SILU,
    rope=Rope(10_000.0),
)
KINDS = ("fp32", "bf16", "turbo4", "turbo4,0:fp32", "k=int8,v=turbo2")


def layout_of(kv: str) -> Layout:
    return plan_layout(CONFIG.layer_specs(), parse_choice(kv))


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("given", [3 << 20, 20 << 20, 20_000_001])
def test_the_store_of_a_budget_has_its_bytes_and_no_block_more_would_fit(kv: str, given: int) -> None:
    layout, passing = layout_of(kv), 2
    budget = plan_budget(layout, given, None, passing if layout_of(kv).open_bytes else 0, CONFIG.max_positions)
    kept = OPEN_BLOCKS * budget.running + budget.tails if layout.open_bytes else 0
    store = Store(layout, budget.blocks, kept, passing if layout.open_bytes else 0)
    assert store.nbytes == budget.nbytes <= given
    assert budget.nbytes + layout.block_bytes > given


@pytest.mark.parametrize("kv", KINDS)
def test_an_engine_of_a_budget_takes_just_its_bytes(kv: str) -> None:
    layout = layout_of(kv)
    backend = select_backend(CONFIG, torch.float32)
    model = randomize(build(CONFIG, backend, torch.float32), seed=1)
    loaded = Loaded("random", CONFIG, model, layout, backend, Path())
    budget = loaded.budget(8 << 20, 4)
    engine = loaded.engine(budget)
    assert engine.runner.store.nbytes == budget.nbytes <= 8 << 20
    assert engine.scheduler.most_running == budget.running == 4
    assert engine.runner.manager.pool.capacity * layout.block_size == budget.tokens


def test_what_a_budget_buys_is_told_in_sessions() -> None:
    layout = layout_of("fp32")  # 3 layers x 2 heads x 2 streams x 32 numbers x 4 bytes = 1.5 KiB a token
    budget = plan_budget(layout, 12 << 20, 4, 0, 8192)
    assert (budget.tokens, budget.sessions(4096), budget.sessions(4097), budget.sessions(8192)) == (8192, 2, 1, 1)
    assert budget.describe(8192) == (
        "KV fp32: 12.0 MiB hold 8,192 tokens, sessions of tokens: 2 of 4,096; 4 sequences at once"
    )
    assert "8 of 1,000" in budget.describe(1000)


def test_too_small_a_budget_is_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"50.0 KiB is too small: one block of 64 tokens takes 96.0 KiB$"):
        plan_budget(layout_of("fp32"), 50 << 10, None, 0, 8192)
    with pytest.raises(ConfigError, match=r"the open blocks of 8 sequences"):
        plan_budget(layout_of("turbo4"), 1 << 20, 8, 0, 8192)


def test_the_default_is_half_of_what_is_free_and_no_more_than_could_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of("fp32")
    monkeypatch.setattr(budget_module, "free_memory", lambda: 24 << 20)
    assert plan_budget(layout, None, 4, 0, 8192).nbytes == 12 << 20
    monkeypatch.setattr(budget_module, "free_memory", lambda: 24 << 30)
    assert plan_budget(layout, None, 4, 0, 8192).tokens == 4 * 8192


def test_open_blocks_take_at_most_a_quarter_unless_more_sequences_are_asked_for() -> None:
    layout = layout_of("turbo4")
    few = plan_budget(layout, 2 << 20, None, 0, 8192)
    assert 1 <= few.running < 32
    assert (OPEN_BLOCKS * few.running + few.tails) * layout.open_bytes <= (2 << 20) / 4
    assert plan_budget(layout, 64 << 20, None, 0, 8192).running == 32


def test_free_memory_is_some_of_this_machine() -> None:
    assert 1 << 20 < budget_module.free_memory() < 1 << 50


def test_more_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvist.service.budget.free_memory", lambda: 23 << 30)
    with pytest.raises(
        ConfigError, match=r"819 TiB is more than the 23\.0 GiB that this machine or container has free"
    ):
        plan_budget(layout_of("fp32"), 900 * 10**12, None, 0, 8192)
    assert plan_budget(layout_of("fp32"), 22 << 30, None, 0, 8192).nbytes <= 22 << 30


def machine(root: Path, available: int, groups: str, **files: str) -> Path:
    """A tree of `proc` and `sys`, with the files of control groups by their paths (`__` for a slash)."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:  {available} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 1000 << 10),
        ("0::/\n", {"memory_dot_max": "max\n", "memory_dot_current": "5\n", "memory_dot_stat": ""}, 1000 << 10),
        # What is cached of files can be dropped.
        (
            "0::/\n",
            {"memory_dot_max": "9000", "memory_dot_current": "8000", "memory_dot_stat": "anon 1\ninactive_file 3000"},
            4000,
        ),
        # The group above has less than one's own.
        (
            "0::/a/b\n",
            {
                "a__b__memory_dot_max": "9000",
                "a__b__memory_dot_current": "1000",
                "a__b__memory_dot_stat": "",
                "a__memory_dot_max": "7000",
                "a__memory_dot_current": "6500",
                "a__memory_dot_stat": "",
            },
            500,
        ),
        # Version 1; the path is the host's, and this container sees its own group alone.
        (
            "4:memory:/docker/x\n",
            {
                "memory__memory_dot_limit_in_bytes": "6000",
                "memory__memory_dot_usage_in_bytes": "2000",
                "memory__memory_dot_stat": "total_inactive_file 500",
            },
            4500,
        ),
        ("0::/../../x\n", {"memory_dot_max": "10", "memory_dot_current": "99", "memory_dot_stat": ""}, 0),
        ("nonsense", {"memory_dot_max": "what", "memory_dot_current": "", "memory_dot_stat": ""}, 1000 << 10),
    ],
)
def test_what_is_free_is_the_least_of_all_limits(
    groups: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    assert free_memory(machine(tmp_path, 1000, groups, **files)) == expected
