"""A model in memory with its tokenizer: what engines are made from."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kvist.base.errors import ConfigError, WeightsError
from kvist.base.events import Listener
from kvist.cache.choice import parse_choice
from kvist.cache.codecs import BF16, FP16, FP32
from kvist.cache.kept import KeptCache
from kvist.cache.layout import BLOCK_SIZE, Layout, plan_layout
from kvist.models.config import ModelConfig
from kvist.models.decoder import Decoder
from kvist.models.load import DTYPES, load, load_config, stored_dtype
from kvist.ops.backend import Backend, select
from kvist.runtime.engine import Engine
from kvist.runtime.runner import Runner
from kvist.runtime.widths import probe
from kvist.service.budget import KvBudget, plan_budget
from kvist.service.calibration import AUTO, planned
from kvist.service.packing import BITS, open_packed
from kvist.text.tokenizer import Tokenizer
from kvist.weights.checkpoint import Checkpoint, Stamp, stamp_of
from kvist.weights.hub import resolve

BUNDLED = Path(__file__).parent.parent / "bundled"
RECALL = BUNDLED / "recall"
_FULL = {codec.dtype: codec for codec in (FP32, BF16, FP16)}
_KV_OF = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Loaded:
    """A decoder, its cache's layout and the operators that it runs on; any number of engines may share it. `stamp`: of
    the weight files, as they were when they were read; empty where the weights are of none."""

    name: str
    config: ModelConfig
    model: Decoder
    layout: Layout
    backend: Backend
    directory: Path
    stamp: Stamp = ()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights, read afresh. Raises `TextError` when there is none."""
        return Tokenizer.load(self.directory)

    def with_kv(self, kv: str) -> "Loaded":
        """The same model in memory over a cache of other codecs; `kv` as `open_model` takes it."""
        return replace(self, layout=planned(self.model, self.directory, kv, self.layout.full))

    def engine(self, tokens: int, sequences: int = 1, listener: Listener | None = None) -> Engine:
        """An engine whose cache holds `sequences` sequences of `tokens` tokens each, at most the context's."""
        tokens = min(tokens, self.config.max_positions)
        blocks = sequences * -(-tokens // self.layout.block_size)
        return Engine(Runner(self.model, self.layout, blocks, self.backend, listener, sequences))

    def budget(self, nbytes: int | None = None, running: int | None = None) -> KvBudget:
        """What `nbytes` of KV memory buy for this model; see `plan_budget`. Nothing is allocated."""
        passing = probe(self.model.linears()).most // self.layout.block_size if self.layout.open_bytes else 0
        return plan_budget(self.layout, nbytes, running, passing, self.config.max_positions)

    def serving_engine(
        self,
        budget: KvBudget,
        listener: Listener | None = None,
        kept: KeptCache | None = None,
        identity: bytes = b"",
    ) -> Engine:
        """An engine whose cache is that of the budget. `kept`: the tiers behind it, under `identity`."""
        runner = Runner(
            self.model, self.layout, budget.blocks, self.backend, listener, budget.running, budget.tails, identity
        )
        return Engine(runner, kept=kept)


def open_model(
    name: str | None, *, dtype: str | None = None, kv: str | None = None, weights: str | None = None
) -> Loaded:
    """Load a directory or a hub id; without a name the bundled model.

    `dtype`: fp32, bf16 or fp16, by default as stored. `kv`: the cache's codecs, as `parse_choice` reads them, by
    default the one of the same type, which loses nothing; "auto" is what `kvist calibrate` proposed for this model. A
    model whose codecs want to be calibrated is, at its first use. `weights`: int8 or int4 packs the matrices as they
    are read; `dtype` is then that of the cache. The environment's KVIST_OPS forces an operator implementation (cpu,
    portable, reference).
    """
    directory = BUNDLED if name is None else resolve(name, progress=True)
    config = load_config(directory)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"there is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if weights is not None and weights not in BITS:
        raise ConfigError(f"there are no weights {weights!r}; choose one of {', '.join(BITS)}")
    compute = DTYPES[dtype] if dtype else stored_dtype(Checkpoint(directory))
    kv = kv or _KV_OF[compute]
    if kv != AUTO:  # before anything large is read, so that a choice that cannot be is refused at once
        plan_layout(config.layer_specs(), parse_choice(kv), full=_FULL[compute])
    backend = select_backend(config, compute)
    stamp = stamp_of(directory)
    if weights is None:
        model = load(directory, config, backend, compute)
    else:
        model = open_packed(directory, config, backend, weights, stamp, lambda: _tell_packing(directory, weights))
    if stamp_of(directory) != stamp:
        raise WeightsError(f"the weight files in {directory} were changed while they were read; try again")
    layout = planned(model, directory, kv, _FULL[compute])
    return Loaded(name or "kvist-shakespeare", config, model, layout, backend, directory, stamp)


def _tell_packing(directory: Path, weights: str) -> None:
    if sys.stderr.isatty():
        print(f"\x1b[2mkvist: packing the weights of {directory.name} as {weights} (once)\x1b[0m", file=sys.stderr)


def select_backend(config: ModelConfig, compute: torch.dtype) -> Backend:
    """The best operators for this model's heads on this machine, or those that KVIST_OPS names."""
    return select("cpu", compute, config.head_dim, BLOCK_SIZE, os.environ.get("KVIST_OPS") or None)
