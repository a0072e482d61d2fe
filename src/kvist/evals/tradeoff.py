"""Quality against bytes as a picture: a named point for each choice of codecs. Takes matplotlib."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from kvist.base.files import atomic_file
from kvist.evals.fidelity import FidelityReport, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

_INCHES, _DPI = (7.5, 5), 200
_POINTS_PER_INCH = 72
_DOT = 6  # points
_STEPS = 100  # places along a line that names keep off
_REACHES = (7, 16, 28, 42, 60)  # points between a name and its point, the nearest that is free
_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))
_MARGIN = 3  # pixels kept free around a name


def plot(report: FidelityReport, path: Path) -> bool:
    """The figure as PNG; False, and no file, where there is none."""
    drawn = figure(report)
    if drawn is None:
        return False
    with atomic_file(path) as temporary:
        drawn.savefig(temporary, format="png")
    return True


def figure(report: FidelityReport) -> "Figure | None":
    """Mean KL divergence over bytes per token, with the line that no choice is below in both. Choices that change
    nothing have no place on a logarithmic axis; None where that leaves none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    rows = [row for row in report.rows if row.divergence.kld_mean > 0]
    if not rows:
        return None
    drawn = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    frontier = _frontier(rows)
    axes.plot(*zip(*map(_place, frontier), strict=True), color="0.75", linewidth=1, zorder=1)
    for color, kind in (("C0", "turbo"), ("C1", "baselines"), ("C2", "mixed")):
        if points := [_place(row) for row in rows if _kind(row) == kind]:
            axes.plot(*zip(*points, strict=True), "o", color=color, markersize=_DOT, zorder=3, label=kind)
    axes.legend(frameon=False, fontsize=8)
    axes.set(yscale="log", xlabel="KV cache, bytes per token")
    axes.set_ylabel(f"mean KL divergence from {report.base} (nats per token)")
    axes.margins(x=0.12, y=0.12)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(alpha=0.25, which="major")
    bits = report.rows[0].bits_per_value / report.rows[0].bytes_per_token
    top = axes.secondary_xaxis("top", functions=(lambda x: x * bits, lambda x: x / bits))
    top.set_xlabel("bits per value, scales included")
    axes.set_title(f"{report.model} · {report.predictions:,} predictions over compressed prefixes", fontsize=10)
    drawn.canvas.draw()
    drawn.set_layout_engine("none")  # as laid out now, so that names stay where they are found to be free
    _name_points(axes, rows, frontier)
    return drawn


def _place(row: Row) -> tuple[float, float]:
    return row.bytes_per_token, row.divergence.kld_mean


def _kind(row: Row) -> str:
    """Choices that mix codecs apart from those of one."""
    if "," in row.choice:
        return "mixed"
    return "turbo" if row.choice.startswith("turbo") else "baselines"


def _frontier(rows: Sequence[Row]) -> list[Row]:
    """The choices that no other beats in bytes and in divergence, by bytes."""
    best: list[Row] = []
    for row in sorted(rows, key=_place):
        if not best or row.divergence.kld_mean < best[-1].divergence.kld_mean:
            best.append(row)
    return best


def _name_points(axes: "Axes", rows: Sequence[Row], line: Sequence[Row]) -> None:
    """Each name beside its point, or as near as it covers no other name, no point and nothing of `line`."""
    from matplotlib.transforms import Bbox

    pixels = axes.figure.dpi / _POINTS_PER_INCH
    places, corners = (axes.transData.transform([_place(row) for row in these]) for these in (rows, line))
    taken = [Bbox.from_bounds(*(place - _DOT * pixels / 2), *[_DOT * pixels] * 2) for place in places]
    for start, end in pairwise(corners):
        steps = (start + (end - start) * step / _STEPS for step in range(_STEPS))
        taken += [Bbox.from_bounds(x, y, 1, 1) for x, y in steps]
    taken.append(axes.get_legend().get_window_extent())
    for row, place in zip(rows, places, strict=True):
        text = axes.annotate(row.kv, place, xycoords="figure pixels", fontsize=8)
        size = text.get_window_extent()
        text.remove()
        reach, box = next(_free(axes, place, (size.width, size.height), taken))
        taken.append(box)
        leader = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            row.kv,
            _place(row),
            xytext=((box.x0 + _MARGIN - place[0]) / pixels, (box.y0 + _MARGIN - place[1]) / pixels),
            textcoords="offset points",
            fontsize=8,
            zorder=4,
            arrowprops=leader if reach > _REACHES[0] else None,
        )


def _free(
    axes: "Axes", place: Sequence[float], size: tuple[float, float], taken: Sequence["Bbox"]
) -> Iterator[tuple[int, "Bbox"]]:
    """Boxes for a name of `size` pixels around its point, nearest first: those that are free, then any."""
    from matplotlib.transforms import Bbox

    pixels, frame = axes.figure.dpi / _POINTS_PER_INCH, axes.get_window_extent()
    boxes = []
    for reach in _REACHES:
        for right, up in _SIDES:
            width, height = size[0] + 2 * _MARGIN, size[1] + 2 * _MARGIN
            middle = place[0] + right * (reach * pixels + width / 2), place[1] + up * (reach * pixels + height / 2)
            box = Bbox.from_bounds(middle[0] - width / 2, middle[1] - height / 2, width, height)
            boxes.append((reach, box))
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not box.count_overlaps(taken):
                yield reach, box
    yield boxes[0]
