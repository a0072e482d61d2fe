"""The config of any decoder that transformers knows, as far as the cache has to know it."""

import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvist.base.errors import ConfigError, KvistError, brief
from kvist.base.files import read_json
from kvist.cache.spec import Full, LayerSpec, Window, key_value
from kvist.models.config import MAX_LAYERS, Activation, ModelConfig
from kvist.models.keys import MOST

_SAID = 160  # characters of what transformers says


@dataclass(frozen=True, kw_only=True)
class HfConfig(ModelConfig):
    """`raw`: the whole config as transformers reads it, JSON. `version`: of transformers, whose code is part of what
    decides the mathematics. `softcap`: of scores; 0: none."""

    raw: str
    version: str
    softcap: float = 0.0

    def layer_specs(self) -> tuple[LayerSpec, ...]:
        windows = self.windows or (0,) * self.layers
        retentions = (Window(window) if window else Full() for window in windows)
        return tuple(key_value(self.kv_heads, self.head_dim, kept, self.softcap) for kept in retentions)


def is_installed() -> bool:
    """Whether transformers is there."""
    return importlib.util.find_spec("transformers") is not None


def load_hf_config(directory: Path) -> HfConfig:
    """The config of a checkpoint directory. Raises `ConfigError` for what transformers does not know either, and for
    what is no decoder over keys and values of one shape."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    where = directory / "config.json"
    try:
        read_json(where)  # which refuses what says two things; transformers takes the last
    except KvistError as error:
        raise ConfigError(str(error)) from None
    try:
        found = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        text = found.get_text_config()
        raw = json.dumps(text.to_dict(), sort_keys=True, default=str)
    except Exception as error:  # its configs check little, and fail in their own ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{where}: transformers cannot read it: {reason[:_SAID]}") from None
    if found.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(f"{where}: a model of type {brief(found.model_type)} continues no text")

    def number(*names: str, default: int | None = None) -> int:
        for name in names:
            value = getattr(text, name, None)
            if type(value) is int:
                if abs(value) > MOST:
                    raise ConfigError(f"{where}: {name} should be within 2^53, got {brief(value)}")
                return value
        if default is None:
            raise ConfigError(f"{where}: transformers' config of {brief(found.model_type)} has no {names[0]}")
        return default

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    layers, positions = number("num_hidden_layers"), number("max_position_embeddings")
    if not 1 <= layers <= MAX_LAYERS:
        raise ConfigError(f"{where}: num_hidden_layers should be from 1 to {MAX_LAYERS:,}, got {brief(layers)}")
    softcap = getattr(text, "attn_logit_softcapping", None) or 0.0
    if type(softcap) not in (int, float) or not 0 <= softcap < 1e6:
        raise ConfigError(f"{where}: attn_logit_softcapping should be positive, got {brief(softcap)}")
    return HfConfig(
        family=found.model_type,
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size", "ffn_dim", default=hidden),
        layers=layers,
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=hidden // max(heads, 1)),
        max_positions=positions,
        norm_eps=0.0,  # transformers' own code knows
        activation=Activation.SILU,
        rope=None,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        windows=_windows(text, layers, positions, where),
        raw=raw,
        version=importlib.metadata.version("transformers"),
        softcap=float(softcap),
    )


def _windows(text: Any, layers: int, positions: int, where: Path) -> tuple[int, ...]:
    """The window of each layer, as transformers' masks have it."""
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * layers
    if window is not None and (type(window) is not int or abs(window) > MOST):
        raise ConfigError(f"{where}: sliding_window should be a whole number, got {brief(window)}")
    known = {"full_attention": 0, "sliding_attention": window or 0}
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(f"{where}: layer_types should name {layers} layers, got {brief(kinds)}")
    if others := [kind for kind in kinds if not isinstance(kind, str) or kind not in known]:
        raise ConfigError(f"{where}: layers of types {brief(others)} are not supported")
    found = tuple(known[kind] for kind in kinds)
    return tuple(size if size < positions else 0 for size in found) if any(found) else ()
