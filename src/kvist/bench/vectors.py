"""Vector search over codes beside faiss's product quantizer at equal bytes, and beside exact search.

Faiss (Johnson et al. 2019) is optional. Its threads are not PyTorch's: it is given as many, and the two never work at
the same time.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from kvist.base.errors import ConfigError
from kvist.bench.machine import Samples, facts, interleave
from kvist.bench.report import Ratio, Report, Row
from kvist.models.families import load_config
from kvist.models.load import load
from kvist.models.plain import PlainActivations, PlainView
from kvist.service.calibration import built_in_text
from kvist.service.loaded import BUNDLED
from kvist.text.tokenizer import Tokenizer
from kvist.vectors import VectorIndex

BITS = (4, 2)
QUERIES, TIMED = 500, 200  # asked for recall, and of these in each measurement of time
K = 10
ROUNDS = 3
CLUSTERS = 256


@dataclass(frozen=True)
class Data:
    """`base` [n, dim] and `queries` [QUERIES, dim] float32, of unit length, none of the queries among the base."""

    name: str
    base: Tensor
    queries: Tensor


class Engine(Protocol):
    """Something that holds vectors and finds the K of largest inner product: ids [m, K]."""

    name: str

    def add(self, base: Tensor) -> None: ...

    def search(self, queries: Tensor) -> Tensor: ...

    def vector_bytes(self) -> float: ...


def isotropic(dim: int, count: int) -> Data:
    """Directions uniformly at random: the hardest there are, since no vector is near another."""
    return _split(f"isotropic-{dim}", torch.randn(count + QUERIES, dim, generator=torch.Generator().manual_seed(dim)))


def clustered(dim: int, count: int) -> Data:
    """Built to resemble embeddings: a mean that all share, 256 clusters, and channels whose deviation falls as the root
    of their rank, in random order."""
    generator = torch.Generator().manual_seed(dim)
    deviation = (torch.arange(1, dim + 1) ** -0.5)[torch.randperm(dim, generator=generator)]
    centres = (torch.randn(CLUSTERS, dim, generator=generator) + 0.5) * deviation
    members = centres[torch.randint(CLUSTERS, (count + QUERIES,), generator=generator)]
    noise = torch.randn(members.shape, generator=generator)
    return _split(f"clustered-{dim}", members + 0.5 * noise * deviation)


def hidden_states() -> Data:
    """The last hidden states, 256 numbers each, of the bundled model over the built-in text."""
    config, tokenizer = load_config(BUNDLED), Tokenizer.load(BUNDLED)
    model = load(BUNDLED, config, PlainActivations(), torch.float32)
    states = []
    with torch.inference_mode():
        for tokens in torch.tensor(tokenizer.encode(built_in_text(tokenizer))).split(config.max_positions):
            views = [PlainView() for _ in range(config.layers)]
            states.append(model(tokens, torch.arange(len(tokens)), views))
    x = torch.cat(states)
    return _split("hidden-256", x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))].clone())


DATA: dict[str, Callable[[], Data]] = {
    "isotropic-200": lambda: isotropic(200, 50_000),
    "clustered-200": lambda: clustered(200, 50_000),
    "clustered-1536": lambda: clustered(1536, 20_000),
    "hidden-256": hidden_states,
}


def has_faiss() -> bool:
    """Whether the comparison with it can run."""
    return importlib.util.find_spec("faiss") is not None


def run(names: Sequence[str], observe: Callable[[str], None]) -> Report:
    """Each of `names` of `DATA` at each of `BITS`. `observe` hears what is being measured.

    Raises `ConfigError` for unknown names.
    """
    for name in names:
        if name not in DATA:
            raise ConfigError(f"there is no data {name!r}; choose among {', '.join(DATA)}")
    faiss = _faiss() if has_faiss() else None
    report = Report(facts())
    if faiss is not None:
        report.machine["faiss"] = f"faiss {faiss.__version__}"
    for name in names:
        observe(f"{name}: making it")
        data = DATA[name]()
        exact = (data.queries @ data.base.T).argmax(1)
        for bits in BITS:
            engines: list[Engine] = [_Kvist(data, bits), _Exact()]
            if faiss is not None:
                engines += [_ProductQuantizer(faiss, data, bits)]
                engines += [_ScalarQuantizer(faiss, data)] if bits == 4 else []
            _measure(report, data, bits, engines, exact, observe)
    return report


def recall(found: Tensor, exact: Tensor, k: int) -> float:
    """Recall 1@k: the share of queries whose exact best (ids [m]) is among the first k of `found` [m, K]."""
    return float((found[:, :k] == exact[:, None]).any(1).float().mean())


class _Kvist:
    def __init__(self, data: Data, bits: int) -> None:
        self.name = "kvist"
        self._index = VectorIndex(data.base.shape[1], bits)

    def add(self, base: Tensor) -> None:
        self._index.add(base)

    def search(self, queries: Tensor) -> Tensor:
        return self._index.search(queries, K)[1]

    def vector_bytes(self) -> float:
        return self._index.nbytes / len(self._index)


class _Exact:
    """Every product, in float32."""

    def __init__(self) -> None:
        self.name = "exact"

    def add(self, base: Tensor) -> None:
        self._base = base

    def search(self, queries: Tensor) -> Tensor:
        return (queries @ self._base.T).topk(K).indices

    def vector_bytes(self) -> float:
        return self._base.shape[1] * self._base.itemsize


class _Faiss:
    """What faiss's indexes have in common."""

    def __init__(self, name: str, index: object, code_bytes: int) -> None:
        self.name, self._index, self._bytes = name, index, code_bytes

    def add(self, base: Tensor) -> None:
        self._index.train(base.numpy())
        self._index.add(base.numpy())

    def search(self, queries: Tensor) -> Tensor:
        return torch.from_numpy(self._index.search(queries.numpy(), K)[1])

    def vector_bytes(self) -> float:
        return self._bytes


class _ProductQuantizer(_Faiss):
    """A byte for each 2 numbers (4 bits) or 4 numbers (2 bits), its 256 centroids trained on the base itself.

    By 10 rounds of k-means over 39 vectors a centroid, the fewest that faiss takes without a warning; its defaults are
    25 and 256, and minutes more. That flatters its times to index, and may cost it a little recall.
    """

    def __init__(self, faiss: ModuleType, data: Data, bits: int) -> None:
        dim = data.base.shape[1]
        parts = dim * bits // 8
        index = faiss.IndexPQ(dim, parts, 8, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.niter, index.pq.cp.max_points_per_centroid = 10, 39
        index.pq.cp.min_points_per_centroid = 1
        super().__init__("faiss PQ", index, parts)


class _ScalarQuantizer(_Faiss):
    """4 bits a number, evenly spaced between the least and the largest of its channel."""

    def __init__(self, faiss: ModuleType, data: Data) -> None:
        dim, kind = data.base.shape[1], faiss.ScalarQuantizer.QT_4bit
        super().__init__("faiss SQ", faiss.IndexScalarQuantizer(dim, kind, faiss.METRIC_INNER_PRODUCT), -(-dim // 2))


def _measure(
    report: Report, data: Data, bits: int, engines: Sequence[Engine], exact: Tensor, observe: Callable[[str], None]
) -> None:
    """Indexing is measured once, each search in interleaved rounds."""
    indexing = []
    for engine in engines:
        observe(f"{data.name}, {bits} bits: {engine.name} indexes")
        start = time.perf_counter()
        engine.add(data.base)
        indexing.append(Samples((time.perf_counter() - start,)))
    observe(f"{data.name}, {bits} bits: searches")
    searches = interleave([_search(engine, data.queries[:TIMED]) for engine in engines], ROUNDS)
    count = len(data.base)
    what = f"vectors {data.name} {bits} bits {count}"
    for engine, index, search in zip(engines, indexing, searches, strict=True):
        found = engine.search(data.queries)
        kinds = [
            (Samples((recall(found, exact, 1),)), "recall 1@1"),
            (Samples((recall(found, exact, K),)), f"recall 1@{K}"),
            (index, "s to index"),
            (search.map(lambda seconds: seconds / TIMED * 1e3), "ms a query"),
            (Samples((engine.vector_bytes(),)), "bytes a vector"),
        ]
        for samples, unit in kinds:
            if engine.name == "exact" and unit == "s to index":
                continue
            kind = "fp32" if engine.name == "exact" else f"{bits} bits"
            row = (what, engine.name, data.name, "none", kind, count, TIMED, samples.median, unit, samples.spread)
            report.rows.append(Row(*row))
    ours = next(i for i, engine in enumerate(engines) if engine.name == "kvist")
    for engine, index, search in zip(engines, indexing, searches, strict=True):
        if engine.name not in ("kvist", "exact"):
            a, b = f"kvist {bits} bits", f"{engine.name} {bits} bits"
            report.ratios.append(Ratio(f"indexing: {what}", a, b, index.over(indexing[ours]).median))
            report.ratios.append(Ratio(f"search: {what}", a, b, search.over(searches[ours]).median))


def _search(engine: Engine, queries: Tensor) -> Callable[[], object]:
    return lambda: engine.search(queries)


def _split(name: str, x: Tensor) -> Data:
    x = x / x.norm(dim=1, keepdim=True)
    return Data(name, x[QUERIES:].contiguous(), x[:QUERIES].contiguous())


def _faiss() -> ModuleType:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss
