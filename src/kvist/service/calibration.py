"""A model's calibration: measured once, kept beside the kernels in the cache folder, read from then on."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvist.base.errors import ConfigError, TextError
from kvist.base.files import writable_cache_folder
from kvist.cache.calibration import Calibration, StreamStatistics, load_calibration, save_calibration, statistics
from kvist.cache.choice import parse_choice
from kvist.cache.codecs import DenseCodec
from kvist.cache.layout import Layout, plan_layout
from kvist.cache.spec import LayerSpec
from kvist.cache.step import Tie
from kvist.models.decoder import Decoder
from kvist.models.plain import PlainView, keys_of
from kvist.service.digest import model_digest
from kvist.text.tokenizer import Tokenizer

TEXT = Path(__file__).parent.parent / "bundled" / "calibration.txt"
TOKENS = 2048
AUTO = "auto"


@dataclass(frozen=True)
class Vectors:
    """What one layer's attention is given: `q` `[T, heads, dim of keys]`, and of its own cache or of the one it reads
    the first stream `k` and the last one `v`, `[T, kv_heads, dim]` each; `k` is None where there is one. `scale`: of
    q.k; `spec`: how the streams are read; `tie`: where they are tied."""

    q: Tensor
    k: Tensor | None
    v: Tensor
    scale: float
    spec: LayerSpec
    tie: Tie | None = None

    @property
    def streams(self) -> list[Tensor]:
        """All streams, in their order."""
        return [self.v] if self.k is None else [self.k, self.v]

    def sides(self, streams: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The keys and the values, float32, that attention makes of `streams`, which stand for this layer's: the first
        tokens of each, however many."""
        *first, last = (stream.float() for stream in streams)
        positions = torch.arange(len(last))
        return keys_of(self.spec, first[0] if first else None, last, positions, self.tie), last


class _ObservedView(PlainView):
    """A `PlainView` that shows its layer's vectors and, unless others `read` it too, then forgets them: one layer's are
    in memory at a time."""

    def __init__(self, observe: Callable[[Vectors], None], spec: LayerSpec, read: bool) -> None:
        super().__init__(spec=spec)
        self._observe = observe
        self._read = read

    def attend(self, q: Tensor, scale: float, tie: Tie | None = None) -> Tensor:
        self._observe(Vectors(q, self.k, self.v, scale, self._spec, tie))
        out = super().attend(q, scale, tie)
        if not self._read:
            self.k, self.v = None, torch.empty(0)
        return out


class _Reader(PlainView):
    """Reads what another layer has written, and shows it beside its own queries."""

    def __init__(self, observe: Callable[[Vectors], None], spec: LayerSpec, source: PlainView) -> None:
        super().__init__(spec=spec)
        self._observe = observe
        self._source = source

    def attend(self, q: Tensor, scale: float, tie: Tie | None = None) -> Tensor:
        self.k, self.v = self._source.k, self._source.v
        self._observe(Vectors(q, self.k, self.v, scale, self._spec, tie))
        return super().attend(q, scale, tie)


@torch.inference_mode()
def observe(model: Decoder, tokens: list[int], see: Callable[[int, Vectors], None]) -> None:
    """Runs `tokens` once, without a cache; `see` gets the number and the vectors of each layer, in order, also of those
    that read another's cache."""

    def view(layer: int, spec: LayerSpec) -> PlainView:
        def show(vectors: Vectors) -> None:
            see(layer, vectors)

        if spec.source is not None:
            return _Reader(show, spec, views[spec.source])
        return _ObservedView(show, spec, layer in read)

    specs, views = model.config.layer_specs(), list[PlainView]()
    read = {spec.source for spec in specs}
    for layer, spec in enumerate(specs):
        views.append(view(layer, spec))
    model(torch.tensor(tokens), torch.arange(len(tokens)), views)


def calibration_path(digest: str) -> Path:
    """Where the calibration of the model of that digest lies."""
    return writable_cache_folder() / "calibration" / f"{digest[:32]}.safetensors"


def planned(model: Decoder, directory: Path, kv: str, full: DenseCodec, weights: Callable[[], str]) -> Layout:
    """The layout of the model's cache under `kv`: a choice as `parse_choice` reads it, or "auto", which stands for
    what `kvist calibrate` proposed. The model is calibrated where a codec wants it; `weights` gives their digest then.
    Raises `ConfigError`.
    """
    specs = model.config.layer_specs()
    if kv != AUTO:
        layout = plan_layout(specs, parse_choice(kv), full=full)
        if not layout.needs_calibration:
            return layout
    calibration = calibrated(model, directory, weights())
    if kv == AUTO and calibration.proposal is None:
        raise ConfigError(
            f"--kv {AUTO} stands for what kvist calibrate proposes; run kvist calibrate on this model first"
        )
    choice = parse_choice(calibration.proposal or "" if kv == AUTO else kv)
    if kv == AUTO and choice.plugins != calibration.plugins:
        raise ConfigError(
            f"--kv {AUTO} stands for {choice.name}, which was measured with {_told(calibration.plugins)}; here is "
            f"{_told(choice.plugins)}: run kvist calibrate again"
        )
    return plan_layout(specs, choice, full=full, calibration=calibration)


def _told(plugins: Mapping[str, str]) -> str:
    return ", ".join(f"{name} of {origin}" for name, origin in plugins.items()) or "Kvist's own codecs"


def calibrated(model: Decoder, directory: Path, weights: str) -> Calibration:
    """The calibration of a model whose weights have that digest, measured now on a built-in text where there is none
    yet.

    Raises `ConfigError` when the file that is there is damaged or belongs to another model.
    """
    digest = model_digest(model, weights)
    path = calibration_path(digest)
    if path.exists():
        return read_calibration(path, model, digest)
    if sys.stderr.isatty():
        print(f"\x1b[2mkvist: measuring the keys and values of {directory.name} (once)\x1b[0m", file=sys.stderr)
    tokens, _ = calibration_text(model, directory)
    calibration = measure(model, tokens, digest)
    save_calibration(path, calibration)
    return calibration


def read_calibration(path: Path, model: Decoder, digest: str) -> Calibration:
    """The calibration in `path`, wherever it was made. `digest`: as `model_digest` gives it. Raises `ConfigError` when
    it is none, is damaged, or is not of this model."""
    calibration = load_calibration(path, digest)
    damage = ConfigError(f"{path} is damaged: its numbers are not those of this model; run kvist calibrate again")
    specs = model.config.layer_specs()
    if len(calibration.streams) != len(specs):
        raise damage
    for spec, found in zip(specs, calibration.streams, strict=True):
        if found.keys() != {stream.name for stream in spec.streams}:
            raise damage
        for stream in spec.streams:
            if not _is_sound(found[stream.name], (stream.heads, stream.dim)):
                raise damage
    if calibration.proposal is not None and not calibration.plugins:  # others' codecs may be gone: `planned` asks
        parse_choice(calibration.proposal).check(specs)
    return calibration


def _is_sound(found: StreamStatistics, shape: tuple[int, int]) -> bool:
    both = (found.mean, found.energy)
    if any(x.dtype is not torch.float32 or tuple(x.shape) != shape or not bool(x.isfinite().all()) for x in both):
        return False
    return bool((found.energy >= 0).all())


def calibration_text(model: Decoder, directory: Path, text: str | None = None) -> tuple[list[int], str]:
    """`text` in the model's tokens, at most `TOKENS` of them and no more than its context; and what they are.

    Without a text the built-in one, less the characters that the vocabulary lacks; arbitrary tokens where the model has
    no tokenizer. Raises `TextError` for a text that cannot be tokenized.
    """
    most = min(TOKENS, model.config.max_positions)
    if text is not None:
        return Tokenizer.load(directory).encode(text)[:most], "text"
    try:
        tokenizer = Tokenizer.load(directory)
    except TextError:
        random = torch.Generator().manual_seed(0)
        return torch.randint(model.config.vocab_size, (most,), generator=random).tolist(), "arbitrary tokens"
    return tokenizer.encode(built_in_text(tokenizer))[:most], "built-in text"


def built_in_text(tokenizer: Tokenizer) -> str:
    """Prose, questions, code and numbers, less the characters that a vocabulary of characters lacks."""
    text = TEXT.read_text("utf-8")
    unknown = {character for character in set(text) if not _is_known(tokenizer, character)}
    return "".join(character for character in text if character not in unknown)


def _is_known(tokenizer: Tokenizer, character: str) -> bool:
    try:
        tokenizer.encode(character)
    except TextError:
        return False
    return True


def measure(model: Decoder, tokens: list[int], digest: str) -> Calibration:
    """Runs `tokens` once, without a cache, and takes the statistics of each layer's streams."""
    specs = model.config.layer_specs()
    streams: list[dict[str, StreamStatistics]] = [{} for _ in specs]

    def see(layer: int, seen: Vectors) -> None:
        own = specs[layer].streams  # none where another layer's are read
        if own:
            streams[layer] = {stream.name: statistics(x) for stream, x in zip(own, seen.streams, strict=True)}

    observe(model, tokens, see)
    return Calibration(digest, len(tokens), tuple(streams))
