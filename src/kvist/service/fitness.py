"""Whether codecs hold a model's keys: measured when they are first used on it, told whenever they are.

Keys with a large bias take the range of a code that is not centred; one that turns with position cannot be centred at
all. Answers are then of no use, and nothing else would say so."""

import contextlib
import hashlib
import json
import logging
from pathlib import Path

from kvist.base.errors import KvistError
from kvist.base.files import atomic_file, read_json, writable_cache_folder
from kvist.cache.layout import Layout
from kvist.models.decoder import Decoder
from kvist.service.calibration import Vectors, calibration_text, observe
from kvist.service.digest import model_digest
from kvist.service.vectors import compare_scores, decoded

LEAST = 0.85  # correlation of a head's scores before and after a codec; one of 2 bits keeps 0.9 of ordinary keys
TOKENS = 512
_MOST_BYTES = 1 << 16  # of what is kept of a model
_log = logging.getLogger("kvist.cache")


def warn(model: Decoder, directory: Path, layout: Layout, weights: str) -> None:
    """One line in the log for layers whose keys the codecs of `layout` do not hold, and what would. `weights`: their
    digest."""
    found = {layer: kept for layer, kept in _known(model, directory, layout, weights).items() if kept < LEAST}
    if not found:
        return
    worst = min(found, key=lambda layer: found[layer])
    places = "layer " + str(worst) if len(found) == 1 else f"{len(found)} layers, layer {worst} least"
    streams = {stream.stream.name for layer in found for stream in layout.layers[layer].streams[:1]}
    held = [f"{layer}:{layout.layers[layer].streams[0].stream.name}={layout.full.name}" for layer in sorted(found)]
    _log.warning(
        "%s does not hold the %s of %s: the scores of its worst head keep a correlation of %.2f with the exact ones, "
        "and answers suffer; --kv %s does, or kvist calibrate and --kv auto",
        layout.kv,
        " and ".join(sorted(streams)),
        places,
        found[worst],
        ",".join([layout.kv, *held]),
    )


def correlations(model: Decoder, layout: Layout, tokens: list[int]) -> dict[int, float]:
    """Of the scores of each layer that keeps something: of the worst head of any that reads it. Of none where the
    tokens are too few for a block that is coded and one that sees it."""
    kept: dict[int, float] = {}
    if len(tokens) < 2 * layout.block_size:
        return kept

    def see(layer: int, seen: Vectors) -> None:
        source = layout.layers[layer].spec.source
        owner = layer if source is None else source
        streams = layout.layers[owner].streams
        pairs = zip(streams, seen.streams, strict=True)
        keys, _ = seen.sides([decoded(stream, x, layout.block_size) for stream, x in pairs])
        (found,) = compare_scores(seen, [keys], layout.block_size)
        kept[owner] = min(float(found.correlation().min()), kept.get(owner, 1.0))

    observe(model, tokens, see)
    return kept


def _known(model: Decoder, directory: Path, layout: Layout, weights: str) -> dict[int, float]:
    """The correlations, measured once and kept beside the calibrations."""
    facts = f"{model_digest(model, weights)} {layout.fingerprint}"
    path = writable_cache_folder() / "calibration" / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(KvistError, KeyError, AttributeError, TypeError, ValueError):  # damaged: measured again
        if path.exists() and (known := read_json(path, _MOST_BYTES)).get("facts") == facts:
            return {int(layer): float(kept) for layer, kept in known["kept"].items()}
    tokens, _ = calibration_text(model, directory)
    found = correlations(model, layout, tokens[:TOKENS])
    with contextlib.suppress(KvistError, OSError), atomic_file(path) as target:  # it is only slower next time
        target.write_text(json.dumps({"facts": facts, "kept": found}))
    return found
