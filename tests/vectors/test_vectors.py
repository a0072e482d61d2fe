"""The index finds what a search over its decoded vectors finds, stores what it says, refuses what it cannot read."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from kvist.base.errors import KvistError
from kvist.cache.codecs.codebook import codebook
from kvist.vectors import VectorIndex
from kvist.vectors.rotation import Rotation


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def built(x: Tensor, bits: int = 4, metric: str = "ip") -> VectorIndex:
    index = VectorIndex(x.shape[1], bits, metric)
    index.add(x)
    return index


@pytest.mark.parametrize("dim", [2, 3, 16, 31, 64, 200, 384, 1000, 1536, 3072, 4093])
def test_rotations_are_orthogonal(dim: int) -> None:
    rotation, x = Rotation(dim), normal(50, dim)
    y = rotation.into(x)
    assert torch.allclose(y @ y.T, x @ x.T, atol=2e-5 * dim)
    assert torch.allclose(rotation.back(y), x, atol=1e-5)
    assert not torch.allclose(y, x, atol=0.1)


@pytest.mark.parametrize("dim", [31, 200, 1000, 1024, 1536])
def test_rotations_spread_each_number_over_all(dim: int) -> None:
    """No channel, and no eighth of them side by side, keeps its energy to itself."""
    matrix = Rotation(dim).into(torch.eye(dim))
    assert float(matrix.abs().max()) < 6 / dim**0.5
    for start in range(0, dim - dim // 8, dim // 8):
        shares = (matrix[start : start + dim // 8] ** 2).sum(0) / (dim // 8 / dim)  # of each rotated number
        assert float(shares.mean()) == pytest.approx(1, abs=1e-5)
        assert float(shares.std()) < 1.4 * (2 / (dim // 8)) ** 0.5  # about as independent normal entries would


@pytest.mark.parametrize("dim", [200, 1536])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_products_are_unbiased_and_near(dim: int, bits: int) -> None:
    x, distortion = unit(normal(2000, dim)), codebook(dim, bits).distortion
    index = built(x * 3, bits)
    error = index.reconstruct(0, 2000) / 3 - x
    found = float((error**2).sum(1).mean())
    assert found == pytest.approx(distortion / (1 - distortion), rel=0.03)
    assert float((error * x).sum(1).abs().max()) < 1e-4  # as scaled: nothing along the vector itself
    queries = unit(x + unit(normal(2000, dim, seed=1)))
    bias = (error * queries).sum(1) / (x * queries).sum(1)
    assert abs(float(bias.mean())) < 4 * float(bias.std()) / 2000**0.5


@pytest.mark.parametrize(("bits", "at_1", "at_10"), [(4, 0.7, 1), (2, 0.35, 0.85)])
def test_recall(bits: int, at_1: float, at_10: float) -> None:
    """Of 100 queries among 5,000 vectors in clusters, channels uneven."""
    deviation = torch.arange(1, 201) ** -0.5
    centres = normal(64, 200) * deviation
    x = unit(centres[torch.arange(5100) % 64] + 0.5 * normal(5100, 200, seed=1) * deviation)
    best = (x[:100] @ x[100:].T).argmax(1)
    found = built(x[100:], bits).search(x[:100], 10)[1]
    assert float((found[:, 0] == best).float().mean()) >= at_1
    assert float((found == best[:, None]).any(1).float().mean()) >= at_10


@st.composite
def indexes(draw: st.DrawFn) -> tuple[VectorIndex, Tensor]:
    """An index, and what went into it, in parts of any size."""
    dim, bits = draw(st.integers(2, 67)), draw(st.sampled_from([1, 2, 4]))
    index = VectorIndex(dim, bits, draw(st.sampled_from(["ip", "cosine"])))
    sizes = draw(st.lists(st.integers(0, 40), max_size=5))
    parts = [normal(size, dim, seed=draw(st.integers(0, 99))) for size in sizes]
    for part in parts:
        index.add(part)
    return index, torch.cat([torch.empty(0, dim), *parts])


def nearly_all_alike(a: Tensor, b: Tensor) -> bool:
    """But for the last bits: how a library rounds a product may depend on how many vectors it has. One of these may
    then have a number on the other side of the middle between two levels."""
    same = torch.isclose(a, b, atol=1e-5).all(1)
    return a.shape == b.shape and int((~same).sum()) <= 1


@settings(max_examples=60)
@given(drawn=indexes(), queries=st.integers(0, 4), k=st.integers(1, 50), small=st.booleans())
def test_a_search_is_one_over_the_decoded_vectors(
    drawn: tuple[VectorIndex, Tensor], queries: int, k: int, small: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    index, x = drawn
    with pytest.MonkeyPatch.context() as patch:
        if small:  # so that even these are searched in several pieces
            patch.setattr("kvist.vectors.index._AT_A_TIME", 256)
        q = normal(queries, index.dim, seed=7)
        scores, ids = index.search(q, k)
        known = index.reconstruct(0, len(index))
        assert known.shape == x.shape
        products = (unit(q) if index.metric == "cosine" else q) @ known.T
        expected = products.topk(min(k, len(index))).values
        assert torch.allclose(scores, expected, atol=1e-4)
        assert torch.allclose(products.gather(1, ids), scores, atol=1e-4)
        assert all(len(set(row)) == len(row) for row in ids.tolist())
        path = tmp_path_factory.mktemp("index") / "vectors.safetensors"
        index.save(path)
        loaded = VectorIndex.load(path)
        assert (loaded.dim, loaded.bits, loaded.metric) == (index.dim, index.bits, index.metric)
        assert (len(loaded), loaded.nbytes) == (len(index), index.nbytes)
        for ours, theirs in zip(loaded.search(q, k), (scores, ids), strict=True):
            assert torch.equal(ours, theirs)
        whole = built(x, index.bits, index.metric)
        assert nearly_all_alike(whole.reconstruct(0, len(whole)), known)
        loaded.add(x)
        assert nearly_all_alike(loaded.reconstruct(len(x), 2 * len(x)), known)


@pytest.mark.parametrize(
    ("dim", "bits", "each"), [(200, 4, 104), (200, 2, 54), (1536, 4, 772), (1536, 2, 388), (1536, 1, 196), (67, 4, 38)]
)
def test_bytes_of_a_vector(dim: int, bits: int, each: int, tmp_path: Path) -> None:
    index = built(normal(1000, dim), bits)
    assert index.nbytes == 1000 * each
    index.save(tmp_path / "index")
    assert 0 < (tmp_path / "index").stat().st_size - index.nbytes < 512


def test_lengths_count_for_products_and_not_for_cosine() -> None:
    x = unit(normal(50, 64))
    lengths = 2.0 ** (torch.arange(50) % 8)[:, None]
    cosine, lengthened = built(x, 4, "cosine"), built(x * lengths, 4, "cosine")
    assert torch.equal(cosine.reconstruct(0, 50), lengthened.reconstruct(0, 50))
    assert torch.equal(built(x * lengths).reconstruct(0, 50), built(x).reconstruct(0, 50) * lengths)
    assert cosine.search(x * 9, 1)[0] == pytest.approx(cosine.search(x, 1)[0], abs=1e-6)
    assert cosine.search(x, 1)[0][:, 0] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("size", [2.0**-100, 2.0**50, 2.0**100])
def test_vectors_of_any_size(size: float) -> None:
    x = normal(20, 64)
    assert torch.equal(built(x * size).reconstruct(0, 20), built(x).reconstruct(0, 20) * size)


def test_zeros_and_nothing() -> None:
    index = VectorIndex(64)
    scores, ids = index.search(normal(3, 64), 5)
    assert scores.shape == ids.shape == (3, 0)
    index.add(torch.zeros(2, 64))
    assert index.search(normal(3, 64), 5)[0].tolist() == [[0, 0]] * 3
    assert index.search(torch.zeros(0, 64), 5)[0].shape == (0, 2)


def test_other_floating_types_are_taken() -> None:
    x = normal(20, 64)
    assert torch.equal(built(x.double()).reconstruct(0, 20), built(x).reconstruct(0, 20))
    assert torch.equal(built(x.half()).reconstruct(0, 20), built(x.half().float()).reconstruct(0, 20))


def test_what_cannot_be_added_changes_nothing() -> None:
    index = built(normal(30, 64))
    before = index.reconstruct(0, 30)
    for bad in (float("nan"), float("inf"), 3e38):
        x = normal(10, 64)
        x[7, 3] = bad
        if bad == 3e38:
            x[7] = bad  # the norm leaves the range
        with pytest.raises(KvistError, match="not finite, or is too long"):
            index.add(x)
    for x in (normal(10, 63), normal(64), torch.ones(10, 64, dtype=torch.int64)):
        with pytest.raises(KvistError, match=r"takes floating vectors \[n, 64\]"):
            index.add(x)
    assert len(index) == 30
    assert torch.equal(index.reconstruct(0, 30), before)


def test_refusals() -> None:
    with pytest.raises(KvistError, match="2 to 8,192 numbers, not 1"):
        VectorIndex(1)
    with pytest.raises(KvistError, match="in 1, 2, 4 bits, not 3"):
        VectorIndex(64, 3)
    with pytest.raises(KvistError, match="no metric 'l2'; choose one of ip, cosine"):
        VectorIndex(64, 4, "l2")
    index = built(normal(10, 64))
    with pytest.raises(KvistError, match="at least one vector, not 0"):
        index.search(normal(1, 64), 0)
    with pytest.raises(KvistError, match="a query has a number that is not finite"):
        index.search(torch.full((1, 64), float("nan")), 1)
    with pytest.raises(KvistError, match="takes floating vectors"):
        index.search(normal(1, 32), 1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    built(normal(100, 64)).save(tmp_path / "index")
    return tmp_path / "index"


def refusal(path: Path) -> str:
    with pytest.raises(KvistError) as refused:
        VectorIndex.load(path)
    text = str(refused.value)
    assert str(path) in text
    assert "\n" not in text
    return text


def test_files_that_are_no_index(tmp_path: Path, saved: Path) -> None:
    assert "cannot read" in refusal(tmp_path / "absent")
    assert "cannot read" in refusal(tmp_path)
    (tmp_path / "text").write_text("not an index")
    assert "not a whole vector index" in refusal(tmp_path / "text")
    whole = saved.read_bytes()
    for length in (0, 7, 50, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        assert "not a whole vector index" in refusal(tmp_path / "cut")
    save_file({"weight": torch.ones(3)}, tmp_path / "model")
    assert "not a vector index of this version" in refusal(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "facts", "finding"),
    [
        ({"codes": None}, {}, "it has no codes of type U8"),
        ({"scales": None}, {}, "it has no scales of type F32"),
        ({"scales": torch.ones(100, dtype=torch.float64)}, {}, "it has no scales of type F32"),
        ({"scales": torch.ones(99)}, {}, "do not fit"),
        ({"codes": torch.zeros(100, 31, dtype=torch.uint8)}, {}, "do not fit"),
        ({"codes": torch.zeros(3200, dtype=torch.uint8)}, {}, "do not fit"),
        ({"scales": torch.full((100,), float("nan"))}, {}, "a scale is no number"),
        ({}, {"format": "kvist-vectors-0"}, "not a vector index of this version"),
        ({}, {"dim": "128"}, "do not fit"),
        ({}, {"dim": "many"}, "invalid literal"),
        ({}, {"dim": "10000000"}, "2 to 8,192"),
        ({}, {"bits": "3"}, "bits, not 3"),
        ({}, {"metric": "l2"}, "no metric 'l2'"),
    ],
)
def test_damaged_files(saved: Path, changes: dict[str, Tensor | None], facts: dict[str, str], finding: str) -> None:
    tensors = {"codes": torch.zeros(100, 32, dtype=torch.uint8), "scales": torch.ones(100)} | changes
    whole = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(whole, saved, {"format": "kvist-vectors-1", "dim": "64", "bits": "4", "metric": "ip"} | facts)
    assert finding in refusal(saved)


def test_a_save_that_fails_leaves_the_file_before_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr("kvist.vectors.index.save_file", full)
    with pytest.raises(KvistError, match=r"cannot write .*No space left"):
        built(normal(10, 64)).save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["index"]


def test_a_flipped_byte_is_another_vector(saved: Path) -> None:
    """Any byte is a code, so damage of this kind is found by a checksum of the file or not at all."""
    raw = bytearray(saved.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8:start])["codes"]["data_offsets"][0] in (0, 400)
    raw[-1] ^= 0x40
    saved.write_bytes(raw)
    known, found = built(normal(100, 64)).reconstruct(0, 100), VectorIndex.load(saved).reconstruct(0, 100)
    assert (known != found).any(1).sum() == 1
