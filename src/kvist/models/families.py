"""Every family: which reader understands its `config.json`, and which decoder computes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvist.base.errors import PluginError, UnknownFamily, brief
from kvist.base.files import read_json
from kvist.base.registry import Registry
from kvist.models import deepseek, gemma, gemma4, gpt2, llama, neox, qwen3_moe
from kvist.models.config import ModelConfig
from kvist.models.decoder import Activations, Decoder
from kvist.models.keys import Keys


@dataclass(frozen=True)
class Family:
    """`read`: the config of a checkpoint. `decoder`: from that config and the element-wise operators."""

    read: Callable[[Keys], ModelConfig]
    decoder: Callable[[Any, Activations], Decoder]


def _refusal(name: str, family: Family) -> str | None:
    if not isinstance(family, Family) or not callable(family.read) or not callable(family.decoder):
        return "it is no Family of two functions, read and decoder"
    return None if name and name.isprintable() else "its name is no model_type"


# By `model_type`, which is the `family` of a config.
FAMILIES: Registry[Family] = Registry("family of models", "kvist.families", _refusal)
for _name, _family in {
    "gpt2": Family(gpt2.read, gpt2.GPT2),
    **{name: Family(partial(llama.read, family=name), llama.Llama) for name in llama.FAMILIES},
    "gpt_neox": Family(neox.read_neox, neox.Neox),
    "phi": Family(neox.read_phi, neox.Neox),
    "stablelm": Family(neox.read_stablelm, neox.Neox),
    "gemma2": Family(partial(gemma.read, family="gemma2"), gemma.Gemma),
    "gemma3_text": Family(partial(gemma.read, family="gemma3_text"), gemma.Gemma),
    "gemma3": Family(gemma.read_gemma3, gemma.Gemma),
    "gemma4_text": Family(gemma4.read, gemma4.Gemma4),
    "gemma4": Family(gemma4.read_gemma4, gemma4.Gemma4),
    "deepseek_v2": Family(deepseek.read, deepseek.Deepseek),
    "qwen3_moe": Family(qwen3_moe.read, qwen3_moe.Qwen3Moe),
}.items():
    FAMILIES.register(_name, _family)


def register_family(name: str, family: Family, *, version: str) -> None:
    """Have checkpoints of that `model_type` read and computed by it, for as long as this process lives.

    `version`: another one whenever the same checkpoint comes to other numbers; what was kept under another is not
    found. Raises `PluginError` for a name that is taken, and for what is no family.
    """
    FAMILIES.register(name, family, version)


def read_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """The config of a checkpoint. `raw`: the parsed `config.json`; `where`: its path, for messages.

    Raises `UnknownFamily`, and `ConfigError` for a missing or ill-typed key, and any key or value that would
    change the mathematics in a way that is not implemented; `PluginError` for a family that cannot be used.
    """
    keys = Keys(raw, where)
    name = keys.take("model_type", str)
    family = FAMILIES.get(name)
    if family is None:
        raise UnknownFamily(f"{where}: architecture {brief(name)} is not supported ({', '.join(FAMILIES)} are)")
    config = family.read(keys)
    keys.finish(name)
    if FAMILIES.versions([name]) and (not isinstance(config, ModelConfig) or config.family != name):
        raise PluginError(f"{where}: the family {name!r} reads a config that is not of the family {name!r}")
    return config


def load_config(directory: Path) -> ModelConfig:
    """The config of a checkpoint directory. Raises `ConfigError` or `KvistError` naming the file."""
    path = directory / "config.json"
    return read_config(read_json(path), str(path))


def described(config: ModelConfig) -> str:
    """All that decides how weights become numbers, in words: the config, and who made its family where that is not
    us. What is kept of a model is kept under it."""
    made = FAMILIES.versions([config.family])
    return f"{config!r} by {made[config.family]}" if made else repr(config)


def describe(config: ModelConfig, activations: Activations) -> Decoder:
    """A decoder on the meta device: shapes, and no memory yet."""
    with torch.device("meta"):
        return FAMILIES[config.family].decoder(config, activations)
