"""A model in memory with its tokenizer: what engines are made from."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvist.base.errors import ConfigError, TextError, UnknownFamily, WeightsError, install
from kvist.base.events import Listener
from kvist.cache.choice import parse_choice
from kvist.cache.codecs import BF16, FP16, FP32
from kvist.cache.layout import BLOCK_SIZE, Layout, plan_layout
from kvist.hf import config as hf_config
from kvist.models.config import ModelConfig
from kvist.models.decoder import Decoder, Slot
from kvist.models.families import describe, load_config
from kvist.models.linear import Grouping, uniform
from kvist.models.load import DTYPES, Source, allocate, check_layers, fill, slots_in, stored_dtype
from kvist.models.lora import Adapter, Adapters, MergedSource, check_base, check_copies, load_adapter
from kvist.ops.backend import Backend, select
from kvist.runtime.engine import Engine
from kvist.runtime.runner import Runner
from kvist.runtime.widths import probe, widths_folder
from kvist.service.budget import KvBudget, budget_of, plan_budget, room_of
from kvist.service.calibration import AUTO, planned
from kvist.service.digest import known_digest
from kvist.service.packing import BITS, check_memory, open_packed
from kvist.text.tokenizer import TOKENIZER, Tokenizer
from kvist.weights.checkpoint import Checkpoint, Stamp, settled_stamp, stamp_of
from kvist.weights.hub import resolve, resolve_file
from kvist.weights.parts import part_names

if TYPE_CHECKING:
    from kvist.service.keeping import Kept

BUNDLED = Path(__file__).parent.parent / "bundled"
BUNDLED_NAME = "kvist-shakespeare"
RECALL = BUNDLED / "recall"
_FULL = {codec.dtype: codec for codec in (FP32, BF16, FP16)}
ACTIVATIONS = ("int8", "bf16")  # what rows are made of before they meet packed weights
_NONE: Mapping[str, Path] = {}
_KV_OF = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Opening:
    """What `open_model` is given, so that a model can be opened again the same way: from anywhere, as paths are whole.
    `model`: None for the bundled one."""

    model: str | None
    dtype: str | None = None
    kv: str | None = None
    weights: str | None = None
    activations: str | None = None
    adapter: str | None = None

    def open(self, adapters: Mapping[str, Path] = _NONE) -> "Loaded":
        """Raises as `open_model` does, which says what `adapters` are."""
        return open_model(
            self.model,
            dtype=self.dtype,
            kv=self.kv,
            weights=self.weights,
            activations=self.activations,
            adapter=None if self.adapter is None else Path(self.adapter),
            adapters=adapters,
        )


@dataclass(frozen=True)
class Loaded:
    """A decoder, its cache's layout and the operators that it runs on; any number of engines may share it. `directory`:
    of its config and tokenizer; `files`: the folder, or the file, of its weights; `stamp`: of these files, as they were
    when they were read, empty where a later change might not show in it. Neither where the weights are of no file.
    `adapter`: the id of one that is merged into the weights; `adapters`: ids of those that requests may ask for, by
    name. `opening`: how it was opened, where it was."""

    name: str
    config: ModelConfig
    model: Decoder
    layout: Layout
    backend: Backend
    directory: Path
    files: Path | None = None
    stamp: Stamp = ()
    adapter: str = ""
    adapters: Mapping[str, str] = field(default_factory=dict)
    opening: Opening | None = None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the weights, read afresh. Raises `TextError` when there is none."""
        if self.files is not None and self.files.suffix == ".gguf" and not (self.directory / TOKENIZER).is_file():
            raise TextError(f"{self.files} holds no tokenizer: the key 'tokenizer.ggml.model' is missing, or says none")
        return Tokenizer.load(self.directory)

    def with_kv(self, kv: str) -> "Loaded":
        """The same model in memory over a cache of other codecs; `kv` as `open_model` takes it."""
        layout = planned(self.model, self.directory, kv, self.layout.full, self.weights_digest)
        return replace(self, layout=layout)

    def weights_digest(self) -> str:
        """Of all their bytes. All of them are read, unless it is remembered."""
        return known_digest(self.model, self.files, self.stamp, self.adapter)

    def budget(self, nbytes: int | None = None, running: int | None = None) -> KvBudget:
        """What `nbytes` of KV memory buy for this model; see `plan_budget`. Nothing is allocated."""
        passing, most = self._steps()
        return plan_budget(self.layout, nbytes, running, passing, self.config.max_positions, most)

    def room(self, tokens: int, sequences: int = 1, *, prefixes: bool = False) -> KvBudget:
        """What `sequences` sequences of `tokens` tokens each, at most the context's, need, and no more. `prefixes`:
        with room for the ends of those that others go on from, as where blocks are kept. Nothing is allocated."""
        passing, most = self._steps()
        blocks = sequences * -(-min(tokens, self.config.max_positions) // self.layout.block_size)
        if prefixes:
            return budget_of(self.layout, blocks + 1, sequences, passing, most)
        return room_of(self.layout, blocks, sequences, passing, most)

    def budget_of(self, blocks: int, running: int) -> KvBudget:
        """What so many blocks take for this model, for `running` sequences at once. Nothing is allocated."""
        passing, most = self._steps()
        return budget_of(self.layout, blocks, running, passing, most)

    def _steps(self) -> tuple[int, int]:
        """Blocks that a step may fill on its way, and the most tokens of one."""
        most = probe(self.model.linears(), folder=widths_folder()).most
        return most // self.layout.block_size if self.layout.open_bytes else 0, most

    def engine(self, budget: KvBudget, kept: "Kept | None" = None, listener: Listener | None = None) -> Engine:
        """An engine whose cache is that of the budget, over the tiers that `open_kept` opened, if any."""
        runner = Runner(
            self.model,
            self.layout,
            budget.blocks,
            self.backend,
            listener,
            sequences=budget.running,
            tails=budget.tails,
            identity=b"" if kept is None else kept.identity.digest,
            windows=budget.windows,
        )
        return Engine(runner, kept=None if kept is None else kept.cache)


def open_model(
    name: str | None,
    *,
    dtype: str | None = None,
    kv: str | None = None,
    weights: str | None = None,
    activations: str | None = None,
    adapter: Path | None = None,
    adapters: Mapping[str, Path] = _NONE,
) -> Loaded:
    """Load a directory, a GGUF file or a hub id; without a name the bundled model.

    `dtype`: fp32, bf16 or fp16, by default as stored. `kv`: the cache's codecs, as `parse_choice` reads them, by
    default the one of the same type, which loses nothing; "auto" is what `kvist calibrate` proposed for this model. A
    model whose codecs want to be calibrated is, at its first use. `weights`: int8 or int4 packs the matrices as they
    are read, and `dtype` is then that of the cache; a type of numbers decodes them. By default they stay as they are
    stored: the groups of a GGUF file's Q8_0 and Q4_0 as they are, its other quantized types as int8. `activations`:
    bf16 leaves the rows that meet packed weights in floating point. `adapter`: a LoRA adapter that is merged into the
    weights; `adapters`: such that requests may ask for, by name. The environment's KVIST_OPS forces an operator
    implementation (cpu, portable, reference).
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"there is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    if weights is not None and weights not in (*BITS, *DTYPES):
        raise ConfigError(f"there are no weights {weights!r}; choose one of {', '.join((*BITS, *DTYPES))}")
    if weights in DTYPES and dtype not in (None, weights):
        raise ConfigError(
            f"--weights {weights} is computed in {weights}, and --dtype says {dtype}; one of them will do"
        )
    origin = _find(name)
    config, checkpoint = origin.config, origin.checkpoint
    compute = DTYPES[dtype or weights] if dtype or weights in DTYPES else stored_dtype(checkpoint)
    opening = Opening(None if name is None else _lasting(name), dtype, kv, weights, activations, _absolute(adapter))
    kv = kv or _KV_OF[compute]
    if kv != AUTO:  # before anything large is read, so that a choice that cannot be is refused at once
        plan_layout(config.layer_specs(), parse_choice(kv), full=_FULL[compute])
    backend = select_backend(config, compute)
    stamp, lasting = settled_stamp(origin.files)
    check_layers(checkpoint, config)
    model = _describe(config, backend)
    merged, offered = (None if adapter is None else load_adapter(adapter)), _read_adapters(adapters)
    if merged is not None:
        checkpoint = MergedSource(checkpoint, merged, model.slots())
    for one in offered.values():
        check_base(one, model.slots())
        check_copies(one, model.slots(), checkpoint)
    how, grouping = _packing(origin, weights, model)
    if activations is not None and (activations not in ACTIVATIONS or grouping is None):
        raise ConfigError(
            f"--activations is {' or '.join(ACTIVATIONS)}, and says something of packed weights alone; got "
            f"{activations!r}"
        )
    if activations == "bf16":
        model.keep_rows()
        how += ", rows as they are"
    if offered:
        model.unpair()
        how += ", each product on its own"
    if merged is not None:
        how += f", {merged.id}"
    if grouping is not None:
        model.pack(grouping, backend)
    check_memory(model, compute if grouping is None else torch.float32, backend)
    if grouping is None:
        slots = slots_in(checkpoint, model)
        fill(allocate(model, compute), checkpoint, slots)
    else:
        open_packed(model, checkpoint, how, stamp if lasting else (), lambda: _tell_packing(origin, how.split(",")[0]))
    if isinstance(config, hf_config.HfConfig):
        model.check()
    if stamp_of(origin.files) != stamp:
        raise WeightsError(f"the weight files in {origin.files} were changed while they were read; try again")
    if offered:
        Adapters(model, list(offered.values()), compute if grouping is None else torch.float32)
    known, merged_id = stamp if lasting else (), "" if merged is None else merged.id
    weights_digest = cache(lambda: known_digest(model, origin.files, known, merged_id))
    layout = planned(model, origin.directory, kv, _FULL[compute], weights_digest)
    if layout.open_bytes:
        from kvist.service.fitness import warn  # only lossy codecs need it

        warn(model, origin.directory, layout, weights_digest())
    return Loaded(
        BUNDLED_NAME if name is None else plain_name(name),
        config,
        model,
        layout,
        backend,
        origin.directory,
        origin.files,
        known,
        merged_id,
        {called: one.id for called, one in offered.items()},
        opening,
    )


def plain_name(name: str) -> str:
    """What people call the model: the name of its folder, or of its file without .gguf; a hub id as it is."""
    path = Path(name).expanduser()
    if not path.exists():
        return name.removesuffix(".gguf")
    path = path.resolve() if path.name in ("", "..") else path
    return (path.stem if path.suffix == ".gguf" else path.name) or name


def _lasting(name: str) -> str:
    """A name that means the same wherever it is read; a hub id is one."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().absolute())


def _read_adapters(adapters: Mapping[str, Path]) -> dict[str, Adapter]:
    return {called: load_adapter(directory) for called, directory in adapters.items()}


@dataclass(frozen=True)
class _Origin:
    """What a model's name means. `directory`: of config and tokenizer; `files`: the folder, or the file, of weights.
    `grouping`: how the matrices of its decoder are packed where nothing else is asked for, if at all."""

    directory: Path
    files: Path
    config: ModelConfig
    checkpoint: Source
    grouping: Callable[[Sequence[Slot]], Grouping | None] = lambda slots: None


def _find(name: str | None) -> _Origin:
    if name is not None and (path := find_gguf(name)) is not None:
        from kvist.service.gguf import open_gguf  # it imports much that nothing else needs

        found = open_gguf(path)
        return _Origin(found.directory, path, found.config, found.checkpoint, found.grouping)
    directory = BUNDLED if name is None else resolve(name, progress=True)
    return _Origin(directory, directory, _config(directory), Checkpoint(directory))


def _config(directory: Path) -> ModelConfig:
    """The config of one of our families, or else, with kvist[hf], of one of transformers'."""
    try:
        return load_config(directory)
    except UnknownFamily as error:
        if not hf_config.is_installed():
            raise ConfigError(f"{error}; with {install('hf')} transformers' own code runs what it knows") from None
        try:
            return hf_config.load_hf_config(directory)
        except ConfigError as refusal:
            reason = str(refusal).removeprefix(f"{directory / 'config.json'}: ")
            raise ConfigError(f"{error}; nor does transformers' own code run it over a cache: {reason}") from None


def _describe(config: ModelConfig, backend: Backend) -> Decoder:
    if isinstance(config, hf_config.HfConfig):
        from kvist.hf.decoder import HfDecoder  # it imports transformers

        return HfDecoder(config, backend)
    return describe(config, backend)


def find_gguf(name: str) -> Path | None:
    """The GGUF file that a model's name means: itself, one on the hub, or the only one in a directory without other
    weights; of a model that is split, the first. Raises `WeightsError` where there are several models."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return path if path.is_file() else resolve_file(name, progress=True)
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    found = sorted({part_names(file.name)[0] for file in path.glob("*.gguf")})
    if len(found) > 1:
        raise WeightsError(f"{path} holds {len(found)} models in GGUF; name one of them, as in {path / found[0]}")
    if found and not (path / found[0]).is_file():
        raise WeightsError(f"{path / found[0]} is missing: the first of a model's files, which lie in one folder")
    return path / found[0] if found else None


def _packing(origin: _Origin, weights: str | None, model: Decoder) -> tuple[str, Grouping | None]:
    """How the matrices are packed, and what people call that; None where they are not."""
    if weights in BITS:
        return weights, uniform(BITS[weights])
    return "gguf", None if weights in DTYPES else origin.grouping(model.slots())


def _tell_packing(origin: _Origin, how: str) -> None:
    if sys.stderr.isatty():
        as_what = "" if how == "gguf" else f" as {how}"
        print(f"\x1b[2mkvist: packing the weights of {origin.files.name}{as_what} (once)\x1b[0m", file=sys.stderr)


def select_backend(config: ModelConfig, compute: torch.dtype) -> Backend:
    """The best operators for this model's heads on this machine, or those that KVIST_OPS names."""
    return select("cpu", compute, config.head_dim, BLOCK_SIZE, os.environ.get("KVIST_OPS") or None)
