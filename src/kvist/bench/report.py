"""What a benchmark found, for people and for machines. Every benchmark gives a `Report`."""

import dataclasses
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from kvist.base.tables import show


@dataclass(frozen=True)
class Row:
    """One measured number. `spread` holds the first and the third quartile of its samples."""

    what: str
    engine: str
    shape: str
    weights: str
    kv: str
    context: int
    batch: int
    value: float
    unit: str
    spread: tuple[float, float]


@dataclass(frozen=True)
class Ratio:
    """`a` is `value` times as fast as `b` at `what`. Each names an engine and the type of its KV: "kvist bf16"."""

    what: str
    a: str
    b: str
    value: float


@dataclass(frozen=True)
class Report:
    """Facts of the machine, rows and ratios. Numbers from different reports may come from different machines."""

    machine: dict[str, str | float]
    rows: list[Row] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """The same as plain dictionaries and lists."""
        return dataclasses.asdict(self)

    def print(self, console: Console) -> None:
        """Tables of the rows and the ratios, and the machine in one line."""
        rows = Table("what", "engine", "kv", box=None, pad_edge=False)
        rows.add_column("value", justify="right")
        rows.add_column("middle half", justify="right")
        rows.add_column("unit")
        for row in self.rows:
            low, high = (f"{value:.4g}" for value in row.spread)
            rows.add_row(row.what, row.engine, row.kv, f"{row.value:.4g}", f"{low} to {high}", row.unit)
        ratios = Table("what", "as fast as", box=None, pad_edge=False)
        ratios.add_column("times", justify="right")
        for ratio in self.ratios:
            ratios.add_row(ratio.what, f"{ratio.a} as {ratio.b}", f"{ratio.value:.2f}")
        for table in (rows, ratios) if self.ratios else (rows,):
            show(console, table)
            console.print()
        facts = (f"{name} {value:.4g}" if isinstance(value, float) else value for name, value in self.machine.items())
        console.print(" · ".join(facts))
