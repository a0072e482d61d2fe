"""Values over length and depth as a picture: a panel for each choice of codecs. Takes matplotlib."""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvist.base.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

_MOST_COLUMNS = 4
_PANEL_INCHES = (2.4, 2.5)
_DPI = 200


@dataclass(frozen=True)
class Panel:
    """`values[i][j]`: at length i and depth j, None where nothing was measured."""

    title: str
    values: list[list[float | None]]


@dataclass(frozen=True)
class Heatmap:
    """Panels with one scale of colors, from `low` to `high`; `text` writes a value into its cell."""

    label: str
    panels: list[Panel]
    low: float
    high: float
    text: Callable[[float], str]


def draw(
    path: Path, title: str, maps: Sequence[Heatmap], lengths: Sequence[str], depths: Sequence[str], depth_label: str
) -> None:
    """Write the PNG `path`. Lengths run to the right; depths run down, as the context is read."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # As few rows as can be, and as even.
    most = max(len(one.panels) for one in maps)
    columns = -(-most // -(-most // _MOST_COLUMNS))
    rows = [-(-len(one.panels) // columns) for one in maps]
    size = (columns * _PANEL_INCHES[0] + 1.2, sum(rows) * _PANEL_INCHES[1] + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, max(24, round(size[0] * 12))), fontsize=9)
    grid = figure.subplots(sum(rows), columns, squeeze=False)
    first = 0
    for one, count in zip(maps, rows, strict=True):
        places = grid[first : first + count].flatten()
        first += count
        for axes in places[len(one.panels) :]:
            axes.set_visible(False)
        for index, (axes, panel) in enumerate(zip(places, one.panels, strict=False)):
            image = _panel(axes, one, panel)
            axes.set_xticks(range(len(lengths)), lengths)
            axes.set_yticks(range(len(depths)), depths if index % columns == 0 else [])
            if index % columns == 0:
                axes.set_ylabel(depth_label, fontsize=8)
            if index + columns >= len(one.panels):
                axes.set_xlabel("tokens", fontsize=8)
        bar = figure.colorbar(image, ax=list(places), pad=0.02, aspect=15 * count)
        bar.set_label(one.label, fontsize=8)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)


def _panel(axes: "Axes", one: Heatmap, panel: Panel) -> "AxesImage":
    """The cells, each with its value, in the color of the text that can be read on it."""
    cells = [[float("nan") if value is None else value for value in row] for row in zip(*panel.values, strict=True)]
    image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=one.low, vmax=one.high)
    middle = (one.low + one.high) / 2
    for depth, row in enumerate(cells):
        for length, value in enumerate(row):
            if not math.isnan(value):
                color = "black" if value > middle else "white"
                axes.text(length, depth, one.text(value), ha="center", va="center", color=color, fontsize=7)
    axes.set_title(panel.title, fontsize=8)
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image
