"""Which step widths agree: found on this machine, and with products made to disagree on purpose."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvist.base.errors import BackendError
from kvist.runtime import widths
from kvist.runtime.widths import HEAD_LADDER, LADDER, Widths, probe

WEIGHT = torch.empty(96, 64)
linear = F.linear


@pytest.fixture(autouse=True)
def measured_afresh() -> Iterator[None]:
    """What a process remembers of its products must not outlive the products that a test replaces."""
    widths._known.cache_clear()
    yield
    widths._known.cache_clear()


def nudged(out: Tensor) -> Tensor:
    """One bit away, everywhere."""
    return torch.nextafter(out.float(), torch.full_like(out, torch.inf, dtype=torch.float32)).to(out.dtype)


def disagree(monkeypatch: pytest.MonkeyPatch, changed: Callable[[Tensor, Tensor], bool]) -> None:
    """Products whose bits are others where `changed(rows, weight)`."""

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(rows, weight, bias)
        return nudged(out) if changed(rows, weight) else out

    monkeypatch.setattr(widths.F, "linear", product)


def test_a_step_takes_the_narrowest_width_that_holds_it() -> None:
    chosen = Widths((4, 8, 64))
    assert [chosen.fit(rows) for rows in (0, 1, 4, 5, 8, 9, 64)] == [4, 4, 4, 8, 8, 64, 64]
    assert chosen.most == 64
    with pytest.raises(ValueError, match="a step of 65 rows is wider than 64"):
        chosen.fit(65)


def test_products_that_agree_keep_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    disagree(monkeypatch, lambda rows, weight: False)
    assert probe([(WEIGHT, None), (WEIGHT, torch.empty(96))]).agreeing == LADDER
    assert probe([(WEIGHT, None)], HEAD_LADDER).agreeing == HEAD_LADDER


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (lambda rows: rows >= 256, tuple(width for width in LADDER if width < 256)),
        (lambda rows: rows == 24, tuple(width for width in LADDER if width != 24)),
        (lambda rows: rows < 16, tuple(width for width in LADDER if width >= 16)),
        (lambda rows: rows < 64, LADDER[LADDER.index(64) :]),
        (lambda rows: rows >= 64, LADDER[LADDER.index(64) :]),
    ],
    ids=["wide ones differ", "one differs", "narrow ones differ", "two classes", "two classes, the other way"],
)
def test_the_largest_class_of_widths_is_kept(
    monkeypatch: pytest.MonkeyPatch, changed: Callable[[int], bool], expected: tuple[int, ...]
) -> None:
    disagree(monkeypatch, lambda rows, weight: changed(len(rows)))
    assert probe([(WEIGHT, None)]).agreeing == expected


def test_one_product_that_disagrees_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    disagree(monkeypatch, lambda rows, weight: len(rows) > 128 and weight.shape[1] == 80)
    products: list[tuple[Tensor, Tensor | None]] = [(WEIGHT, None), (torch.empty(64, 80), None), (WEIGHT, None)]
    assert probe(products).most == 128
    assert probe([(WEIGHT, None)]).most == 512


def test_rows_whose_bits_depend_on_their_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(rows, weight, bias)
        out[-1] = nudged(out[-1])
        return out

    monkeypatch.setattr(widths.F, "linear", product)
    with pytest.raises(BackendError, match=r"depend on its place .* \(64 to 96 numbers\)"):
        probe([(WEIGHT, None)])


def test_a_place_that_matters_in_wide_steps_only_leaves_the_narrow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(rows, weight, bias)
        if len(rows) > 200:
            out[7] = nudged(out[7])
        return out

    monkeypatch.setattr(widths.F, "linear", product)
    assert probe([(WEIGHT, None)]).most == 192


def test_damaged_weights_change_nothing() -> None:
    assert probe([(torch.full((96, 64), torch.nan), torch.full((96,), torch.inf))]) == probe(
        [(torch.ones(96, 64), torch.ones(96))]
    )


def test_the_probe_sees_through_the_rounding_to_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the columns summed apart from the others: ordinary rows of bfloat16 hardly ever show it."""

    def split_sum(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows32, weight32 = rows.float(), weight.float()
        if len(rows) <= 64:
            return linear(rows32, weight32).to(rows.dtype)
        middle = rows.shape[1] // 2
        halves = linear(rows32[:, :middle], weight32[:, :middle]) + linear(rows32[:, middle:], weight32[:, middle:])
        return halves.to(rows.dtype)

    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.empty(n, 148).normal_(generator=generator).bfloat16() for n in (512, 6))
    differing = (split_sum(rows, weight) != torch.cat([split_sum(part, weight) for part in rows.split(64)])).sum()
    assert int(differing) < 30, "hardly ever is not so"
    monkeypatch.setattr(widths.F, "linear", split_sum)
    assert probe([(torch.empty(6, 148, dtype=torch.bfloat16), None)]).most == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_keep_their_bits_in_every_width_that_agrees(dtype: torch.dtype) -> None:
    """Ordinary numbers, random places, on this machine's own products; sizes on both sides of its thresholds."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    for outputs, columns in ((16, 16), (24, 64), (67, 48), (144, 64), (48, 128), (192, 96)):
        weight, bias = torch.empty(outputs, columns), torch.empty(outputs)
        weight, bias = (x.normal_(generator=generator).to(dtype) for x in (weight, bias))
        rows = torch.empty(512, columns).normal_(generator=generator).to(dtype)
        for b in (None, bias):
            agreeing = probe([(weight, b)]).agreeing
            standard = torch.cat([F.linear(rows[i : i + 1].expand(agreeing[0], -1), weight, b)[:1] for i in range(512)])
            for width in agreeing:
                places = torch.tensor([rng.randrange(512) for _ in range(width)])
                assert torch.equal(F.linear(rows[places], weight, b), standard[places]), (outputs, columns, width)


def test_what_was_found_is_kept_for_the_next_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    products, ladder = [(torch.empty(48, 32), None)], (4, 8, 16)
    first = probe(products, ladder, tmp_path)
    (kept,) = tmp_path.iterdir()

    def next_process(found: object) -> Widths:
        widths._known.cache_clear()
        monkeypatch.setattr(widths, "_most_agreeing", lambda *of: found)
        return probe(products, ladder, tmp_path)

    assert next_process("not asked") == first
    for damaged in ("", "[]", "[5]", "[16, 8]", '{"4": 8}', "[" * 9000, "null"):
        kept.write_text(damaged)
        assert next_process((4, 8)) == Widths((4, 8)), damaged
        assert kept.read_text() == "[4, 8]"
    # Another machine, or the same told to compute otherwise, asks anew.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    widths._machine.cache_clear()
    assert next_process((4,)) == Widths((4,))
    assert len(list(tmp_path.iterdir())) == 2
    # A folder that cannot be written changes nothing.
    widths._known.cache_clear()
    assert probe(products, ladder, kept) == Widths((4,))
    widths._machine.cache_clear()
