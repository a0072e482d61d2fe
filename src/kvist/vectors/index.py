"""An index of vectors for maximum inner product or cosine: rotated, coded, searched by decoding. Nothing is trained.

Each vector is rotated; each of its numbers becomes its nearest centroid (Zandieh et al. 2025, arXiv 2504.19874,
Algorithm 1); one float32 scale is kept, |x|^2 / <x, c> for the centroids c, so that inner products with any query are
unbiased (Vargaftik et al. 2022, arXiv 2108.08842). A query is rotated once and keeps its full precision.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvist.base.errors import KvistError
from kvist.base.files import atomic_file
from kvist.cache.codecs.codebook import codebook
from kvist.vectors.rotation import Rotation

FORMAT = "kvist-vectors-1"
BITS = (1, 2, 4)
METRICS = ("ip", "cosine")
MAX_DIM = 8192
_AT_A_TIME = 1 << 18  # numbers coded or decoded, so that they stay in a core's cache


class VectorIndex:
    """Vectors of `dim` numbers, `bits` bits each; `metric` is `ip` (inner product) or `cosine`.

    Ids count vectors in the order in which they were added. Raises `KvistError` for sizes that do not exist.
    """

    def __init__(self, dim: int, bits: int = 4, metric: str = "ip") -> None:
        if not 2 <= dim <= MAX_DIM:
            raise KvistError(f"an index holds vectors of 2 to {MAX_DIM:,} numbers, not {dim:,}")
        if bits not in BITS:
            raise KvistError(f"an index codes a number in {', '.join(map(str, BITS))} bits, not {bits}")
        if metric not in METRICS:
            raise KvistError(f"there is no metric {metric!r}; choose one of {', '.join(METRICS)}")
        self.dim, self.bits, self.metric = dim, bits, metric
        self._rotation = Rotation(dim)
        centroids = torch.tensor(codebook(dim, bits).centroids)
        self._middles = ((centroids[1:] + centroids[:-1]) / 2).tolist()
        self._table = _decoding_table(centroids, bits)
        self._bytes = -(-dim * bits // 8)  # of a vector's codes
        self._count = 0
        # With room for more than `_count` vectors, so that adding them one by one takes linear time.
        self._codes = torch.empty(0, self._bytes, dtype=torch.uint8)
        self._scales = torch.empty(0)

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and scales of the vectors held."""
        return self._count * (self._bytes + self._scales.itemsize)

    def add(self, x: Tensor) -> None:
        """Vectors x [n, dim] of any floating type. Raises `KvistError` for another shape or numbers not finite."""
        self._reserve(len(self._check(x)))
        end = self._count
        for rows in x.split(max(1, _AT_A_TIME // self.dim)):
            codes, scales = self._encode(rows.float())
            self._codes[end : end + len(rows)], self._scales[end : end + len(rows)] = codes, scales
            end += len(rows)
        # A number that is not finite makes a scale of that kind.
        if not bool(torch.isfinite(self._scales[self._count : end]).all()):
            raise KvistError("a vector has a number that is not finite, or is too long for float32")
        self._count = end

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best for each of queries [m, dim]: scores [m, k] float32, the best first, and ids [m, k] int64.

        Where the index holds fewer than k vectors, as many columns as it holds.
        """
        if k < 1:
            raise KvistError(f"a search asks for at least one vector, not {k}")
        queries = self._check(queries).float()
        if not bool(torch.isfinite(queries).all()):
            raise KvistError("a query has a number that is not finite")
        if self.metric == "cosine":
            queries = _unit(queries)[0]
        # Codes fill whole bytes; what stands beyond the last number meets a zero.
        rotated = queries.new_zeros(len(queries), self._table.shape[1] * self._bytes)
        rotated[:, : self.dim] = self._rotation.into(queries)
        scores, ids = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        step = max(1, _AT_A_TIME // rotated.shape[1])
        for start in range(0, self._count, step):
            end = min(start + step, self._count)
            found = rotated @ self._decode(self._codes[start:end].numpy()).T * self._scales[start:end]
            new, places = found.topk(min(k, end - start), dim=1)
            scores, ids = torch.cat((scores, new), dim=1), torch.cat((ids, places + start), dim=1)
            scores, places = scores.topk(min(k, scores.shape[1]), dim=1)
            ids = ids.gather(1, places)
        return scores, ids

    def reconstruct(self, start: int, end: int) -> Tensor:
        """The vectors start .. end - 1 as the index knows them, [end - start, dim] float32; of unit length for cosine,
        both nearly."""
        decoded = self._decode(self._codes[start:end].numpy())[:, : self.dim] * self._scales[start:end, None]
        return self._rotation.back(decoded)

    def save(self, path: Path) -> None:
        """Whole or not at all, in safetensors form. Raises `KvistError` when it cannot be written."""
        facts = {"format": FORMAT, "dim": str(self.dim), "bits": str(self.bits), "metric": self.metric}
        tensors = {"codes": self._codes[: self._count], "scales": self._scales[: self._count]}
        try:
            with atomic_file(path) as temporary:
                save_file(tensors, temporary, facts)
        except SafetensorError as error:
            raise KvistError(f"cannot write {path}: {_one_line(error)}") from error

    @staticmethod
    def load(path: Path) -> "VectorIndex":
        """The index in the file `path`. Raises `KvistError` when there is none, or not a whole one."""
        try:
            with safe_open(path, framework="pt") as file:
                index = _described(path, file.metadata() or {})
                codes, scales = _shape(path, file, "codes", "U8"), _shape(path, file, "scales", "F32")
                if scales != codes[:1] or codes[1:] != [index._bytes]:
                    raise KvistError(f"{path} is damaged: codes {codes} and scales {scales} do not fit; build it again")
                index._codes, index._scales = file.get_tensor("codes").clone(), file.get_tensor("scales").clone()
        except OSError as error:
            raise KvistError(f"cannot read {path}: {error.strerror or error}") from None
        except SafetensorError as error:
            raise KvistError(f"{path} is not a whole vector index ({_one_line(error)})") from None
        index._count = len(index._scales)
        if not bool(torch.isfinite(index._scales).all()):
            raise KvistError(f"{path} is damaged: a scale is no number; build it again")
        return index

    def _check(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.dim or not x.is_floating_point():
            kind = str(x.dtype).removeprefix("torch.")
            raise KvistError(f"this index takes floating vectors [n, {self.dim}], not {kind} {list(x.shape)}")
        return x

    def _reserve(self, more: int) -> None:
        if self._count + more > len(self._scales):
            room = max(self._count + more, 2 * self._count) - self._count
            self._codes = torch.cat((self._codes[: self._count], self._codes.new_empty(room, self._bytes)))
            self._scales = torch.cat((self._scales[: self._count], self._scales.new_empty(room)))

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, dim] float32 → codes [n, bytes] uint8, the first number of a byte lowest, and scales [n]."""
        unit, norms = _unit(x)
        rotated = self._rotation.into(unit)
        in_deviations = (rotated * self.dim**0.5).numpy()
        each = 8 // self.bits
        codes = np.zeros((len(x), self._bytes * each), np.uint8)
        for middle in self._middles:  # several times as fast as a search for each number
            codes[:, : self.dim] += in_deviations > middle
        packed = codes[:, ::each]
        for place in range(1, each):
            packed = packed | codes[:, place::each] << place * self.bits
        match = (rotated * self._decode(packed)[:, : self.dim]).sum(1)
        lengths = torch.ones_like(norms) if self.metric == "cosine" else norms
        return torch.from_numpy(packed), torch.where(norms == 0, torch.zeros_like(norms), lengths / match)

    def _decode(self, codes: np.ndarray) -> Tensor:
        """Codes [n, bytes] → the centroids that they name, [n, numbers of whole bytes] float32."""
        return torch.from_numpy(self._table.take(codes, axis=0, mode="clip")).flatten(1)


def _decoding_table(centroids: Tensor, bits: int) -> np.ndarray:
    """[256, 8 / bits] float32: the centroids that each byte names."""
    shifts = torch.arange(0, 8, bits)
    return centroids[torch.arange(256)[:, None] >> shifts & (1 << bits) - 1].numpy()


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, d] divided by its norms, and the norms [n]; zeros stay zeros. No square leaves the range of float32."""
    largest = x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    x = x / largest
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / norms.clamp_min(1), (norms * largest)[:, 0]


def _described(path: Path, facts: dict[str, str]) -> VectorIndex:
    if facts.get("format") != FORMAT:
        raise KvistError(f"{path} is not a vector index of this version ({FORMAT})")
    try:
        return VectorIndex(int(facts["dim"]), int(facts["bits"]), facts["metric"])
    except (KeyError, ValueError, KvistError) as error:
        raise KvistError(f"{path} is damaged: {error}; build it again") from None


def _shape(path: Path, file: safe_open, name: str, kind: str) -> list[int]:
    if name not in file.keys() or file.get_slice(name).get_dtype() != kind:  # noqa: SIM118
        raise KvistError(f"{path} is damaged: it has no {name} of type {kind}; build it again")
    return list(file.get_slice(name).get_shape())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
