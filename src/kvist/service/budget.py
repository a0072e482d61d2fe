"""One budget in bytes for everything that holds KV, checked before any of it is allocated."""

import os
from dataclasses import dataclass
from pathlib import Path

from kvist.base.errors import ConfigError
from kvist.base.units import format_bytes, plural
from kvist.cache.layout import OPEN_BLOCKS, Layout

MOST_RUNNING = 32  # sequences at once, where nothing else is asked for
SHARE = 0.5  # of the free memory, where no budget is given
_PREFIXES = 8  # for so many blocks one of each window is kept, beyond what running sequences need
_OPEN_SHARE = 4  # open blocks take at most one part in so many of the budget
_SHOWN = (4096, 32768)  # lengths of sessions that a budget is told in


@dataclass(frozen=True)
class KvBudget:
    """What a budget buys. `nbytes`: of all planes, never more than was given; `running`: sequences at once; `tails`:
    last blocks of sequences that ended, kept in full precision; `passing`: see `Store`; `windows`: blocks of each group
    of layers with a window."""

    layout: Layout
    nbytes: int
    blocks: int
    running: int
    tails: int
    windows: tuple[int, ...] = ()

    @property
    def open_bytes(self) -> int:
        """Of `nbytes`, what open blocks take."""
        return self.nbytes - self.layout.store_bytes(self.blocks, windows=self.windows)

    @property
    def tokens(self) -> int:
        return self.blocks * self.layout.block_size

    def sessions(self, tokens: int) -> int:
        """How many sessions of `tokens` tokens, none of them shared, lie in the cache side by side."""
        return self.blocks // -(-tokens // self.layout.block_size)

    def describe(self, context: int) -> str:
        """One line: bytes, tokens, and sessions of lengths that the context allows."""
        lengths = [length for length in _SHOWN if length <= context] or [context]
        sessions = " or ".join(f"{self.sessions(length):,} of {length:,}" for length in lengths)
        return (
            f"KV {self.layout.kv}: {format_bytes(self.nbytes)} hold {plural(self.tokens, 'token')}, "
            f"sessions of tokens: {sessions}; {plural(self.running, 'sequence')} at once"
        )


def plan_budget(
    layout: Layout, given: int | None, running: int | None, passing: int, context: int, step_tokens: int = 512
) -> KvBudget:
    """The blocks that `given` bytes buy (by default half of the free memory, and no more than `running` sequences of
    the whole context could use). `running`: sequences at once, by default up to 32, fewer where their open blocks would
    take more than a quarter of the budget. `passing`: passing blocks of the store. `step_tokens`: the widest step. Of
    layers with windows there is what the running sequences need, and room for the ends of prefixes.

    Raises `ConfigError`, with numbers, when not even one block fits, or when more is given than there is.
    """
    free = free_memory()
    if given is not None and given > free:
        raise ConfigError(
            f"a KV budget of {format_bytes(given)} is more than the {format_bytes(free)} that this machine or "
            "container has free; give less, or nothing for half of that"
        )
    budget = int(free * SHARE) if given is None else given
    most = MOST_RUNNING if running is None else running
    if running is None and layout.open_bytes:
        most = max(1, min(most, budget // _OPEN_SHARE // ((OPEN_BLOCKS + 1) * layout.open_bytes)))
    kept = (OPEN_BLOCKS + 1) * most if layout.open_bytes else 0
    needed = layout.window_blocks(most, step_tokens)
    fixed = layout.store_bytes(0, kept, passing, needed)
    own, *others = (group.block_bytes for group in layout.groups)
    blocks = int((budget - fixed) // (own + sum(others) / _PREFIXES))
    if blocks < 1:
        beside = [what for what, there in (("the open blocks", kept), ("the windows", needed)) if there]
        raise ConfigError(
            f"a KV budget of {format_bytes(budget)} is too small: one block of {layout.block_size} tokens takes "
            f"{format_bytes(layout.block_bytes)}"
            + (f" and {' and '.join(beside)} of {plural(most, 'sequence')} {format_bytes(fixed)}" if fixed else "")
        )
    if given is None or not own:
        blocks = min(blocks, most * -(-context // layout.block_size))
    return budget_of(layout, blocks, most, passing, step_tokens)


def budget_of(layout: Layout, blocks: int, running: int, passing: int, step_tokens: int = 512) -> KvBudget:
    """What so many blocks take, for `running` sequences at once; the rest as `plan_budget` has it."""
    tails = running if layout.open_bytes else 0
    kept = OPEN_BLOCKS * running + tails if layout.open_bytes else 0
    windows = tuple(count + blocks // _PREFIXES for count in layout.window_blocks(running, step_tokens))
    return KvBudget(layout, layout.store_bytes(blocks, kept, passing, windows), blocks, running, tails, windows)


def room_of(layout: Layout, blocks: int, running: int, passing: int, step_tokens: int = 512) -> KvBudget:
    """What so many blocks take where nothing is kept of sequences that ended: neither tails nor ends of prefixes."""
    kept = OPEN_BLOCKS * running if layout.open_bytes else 0
    windows = tuple(layout.window_blocks(running, step_tokens))
    return KvBudget(layout, layout.store_bytes(blocks, kept, passing, windows), blocks, running, 0, windows)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: of the machine, and of each control group that it runs in. `root`: under
    which `proc` and `sys` lie."""
    limits = [_available(root / "proc/meminfo"), *_groups(root)]
    found = [limit for limit in limits if limit is not None]
    return min(found, default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


def _available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    except (OSError, ValueError, IndexError):
        return None


def _groups(root: Path) -> list[int]:
    """What is left in this process's control groups, from its own up to the outermost, of both versions."""
    found = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    own = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1)}
    for mount, controllers, names in (
        ("sys/fs/cgroup", "", ("memory.max", "memory.current", "inactive_file")),
        ("sys/fs/cgroup/memory", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        path = Path(own.get(controllers, "/").lstrip("/"))
        if ".." in path.parts:  # a group outside of what this container sees
            path = Path()
        for group in (path, *path.parents):
            left = _left(root / mount / group, *names)
            found += [] if left is None else [left]
    return found


def _left(group: Path, limit: str, used: str, cached: str) -> int | None:
    """Of one group's limit. What it counts of files that can be dropped is free."""
    try:
        most = int((group / limit).read_text())  # "max" is none
        lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        droppable = next((int(value) for name, value in lines if name == cached), 0)
        return max(most - max(int((group / used).read_text()) - droppable, 0), 0)
    except (OSError, ValueError):
        return None
