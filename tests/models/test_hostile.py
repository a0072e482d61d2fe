"""Hostile configs, adapters and weight files: each ends soon, read or refused in one line of at most 400 characters."""

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_checkpoints import CASES, Written

from hostile import ends, fuzz
from kvist.base.errors import KvistError
from kvist.hf.config import load_hf_config
from kvist.models.families import describe, load_config, read_config
from kvist.models.load import load
from kvist.models.lora import CONFIG, FILE, load_adapter
from kvist.models.plain import PlainActivations
from kvist.service.plan import context_row
from kvist.weights.checkpoint import Checkpoint, save

INPUTS = 150
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), -float("inf")),
    *(10**300, -(10**300), 2**31, 2**53, 2**63, 2**64, 10**4000, 1025, 16_384, 1 << 24),
    *("", "x", "x" * 100_000, "a\nb", "\x00", "\ud800", "1e400", "full_attention", "yarn", "llama3", "longrope"),
    *([], {}, [[]], [None], [0] * 10_000, ["x" * 99] * 999, {"": {}}, {"x" * 20_000: 1}, {"rope_type": "yarn"}),
]


def nested(rng: random.Random, depth: int) -> Any:
    value: Any = copy.deepcopy(rng.choice(VALUES))
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def mutate(rng: random.Random, value: dict[str, Any]) -> None:
    """Changes, drops, adds or moves one to three keys, also within what is nested."""
    for _ in range(rng.randint(1, 3)):
        at = value
        while (inner := [one for one in at.values() if isinstance(one, dict) and one]) and rng.random() < 0.4:
            at = rng.choice(inner)
        if not at:
            continue
        key = rng.choice(list(at))
        kind = rng.random()
        if kind < 0.1:
            del at[key]
        elif kind < 0.2:
            at[rng.choice(["new", "x" * 9999, "a\nb", "quantization_config", key * 3])] = nested(rng, 0)
        elif kind < 0.3:
            at[key] = json.loads(json.dumps(at[rng.choice(list(at))]))  # a copy: it may hold where it goes
        else:
            at[key] = nested(rng, rng.choice([0, 0, 0, 1, 3, 400]))


def hostile_text(rng: random.Random, text: str) -> str:
    """JSON text, damaged at times as text."""
    kind = rng.random()
    if kind < 0.02:
        return "[" * rng.choice([10, 100_000]) + text
    if kind < 0.04:
        return text[: rng.randrange(len(text))]
    if kind < 0.06:
        return text.replace("{", '{"model_type": "llama", "model_type": "gpt2", ', 1)
    if kind < 0.08:
        return text.replace(":", f': {"9" * rng.choice([400, 9999])}, "z":', 1)
    return text


def write_hostile(rng: random.Random, path: Path, raw: dict[str, Any]) -> None:
    path.write_bytes(hostile_text(rng, json.dumps(raw)).encode(errors="surrogatepass"))


def test_configs(written: Callable[[str], Written], tmp_path: Path) -> None:
    raws = [json.loads((written(case).directory / "config.json").read_text()) for case in CASES]

    def prepare(rng: random.Random) -> Callable[[], object]:
        raw = copy.deepcopy(rng.choice(raws))
        mutate(rng, raw)
        write_hostile(rng, tmp_path / "config.json", raw)
        described = rng.random() < 0.2  # which takes most of the time

        def whole() -> None:
            config = load_config(tmp_path)
            context_row(config, "bf16", 4096)
            if described:
                describe(config, PlainActivations())

        return whole

    assert 0 < fuzz("configs", INPUTS, prepare) < 1


@pytest.mark.slow
def test_the_deepest_is_built_soon() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "vocab_size": 9, "intermediate_size": 8}
    facts = sizes | {"num_hidden_layers": 1024, "max_position_embeddings": 64}
    assert ends(lambda: describe(read_config({"model_type": "llama"} | facts, "c"), PlainActivations()))
    facts |= {"num_hidden_layers": 2, "num_experts": 16_384, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    facts |= {"num_key_value_heads": 2}
    assert ends(lambda: describe(read_config({"model_type": "qwen3_moe"} | facts, "c"), PlainActivations()))


def test_configs_of_others(tmp_path: Path) -> None:
    from transformers import AutoConfig

    raws = [AutoConfig.for_model(name).to_dict() for name in ("olmo2", "granite", "starcoder2", "cohere")]

    def prepare(rng: random.Random) -> Callable[[], object]:
        raw = copy.deepcopy(rng.choice(raws))
        mutate(rng, raw)
        write_hostile(rng, tmp_path / "config.json", raw)
        return lambda: load_hf_config(tmp_path)

    assert fuzz("configs of other families", 20, prepare) > 0


def damaged(rng: random.Random, good: bytes) -> bytes:
    """A safetensors file with a hostile header, or damaged bytes."""
    size = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + size]), good[8 + size :]
    kind = rng.random()
    if kind < 0.2:
        place = rng.randrange(min(len(good), size + 8))
        return good[:place] + rng.randbytes(rng.randint(1, 8)) + good[place + rng.randint(0, 8) :]
    if kind < 0.25:
        return good[: rng.randrange(len(good))]
    if kind < 0.3:
        return rng.choice([0, 1, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little") + good[8:]
    name = rng.choice([key for key in header if key != "__metadata__"])
    if (
        kind < 0.5 and isinstance(header[name], dict) and "shape" in header[name]
    ):  # of no numbers, or of as many as there are, in an absurd shape
        shapes = [[0], [2**40, 0], [0, 2**62], [2**62, 4, 0], [1] * 2000, [], [0] * 999, [2**33, 2**33]]
        header[name]["shape"] = rng.choice(shapes)
        if 0 in header[name]["shape"]:
            rest = {key: value for key, value in header.items() if key not in (name, "__metadata__")}
            return packed(rest, data, name, header[name])
    elif kind < 0.7:
        header[name]["dtype"] = rng.choice(["F64", "I8", "BOOL", "F8_E4M3", "F4", "X", "", 5, None])
    elif kind < 0.85:
        header[rng.choice(["x" * 50_000, "a\nb", "", name + ".lora_A.weight"])] = header.pop(name)
    else:
        mutate(rng, header)
    text = json.dumps(header).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def packed(header: dict[str, Any], data: bytes, name: str, empty: dict[str, Any]) -> bytes:
    """The tensors of `header`, and one of no bytes."""
    offset, parts, found = 0, [], {}
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        found[key] = entry | {"data_offsets": [offset, offset + end - start]}
        parts.append(data[start:end])
        offset += end - start
    found[name] = empty | {"data_offsets": [offset, offset]}
    text = json.dumps(found).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def test_weights(written: Callable[[str], Written], tmp_path: Path) -> None:
    """Opened, streamed, and loaded into a decoder."""
    theirs = written("llama-48-biased").directory
    config, path = load_config(theirs), tmp_path / "model.safetensors"
    source = Checkpoint(theirs)
    save(path, {name: tensor.clone() for name, tensor in source.stream(source.names())})
    good = path.read_bytes()

    def whole() -> None:
        opened = Checkpoint(tmp_path)
        for _, tensor in opened.stream(opened.names()):
            tensor.numel()
        load(tmp_path, config, PlainActivations())

    def prepare(rng: random.Random) -> Callable[[], object]:
        path.write_bytes(damaged(rng, good))
        return whole

    assert ends(whole)
    assert fuzz("weights", INPUTS, prepare) < 1


def test_an_index(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    save(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    good = {"metadata": {"total_size": 12}, "weight_map": {"x": "a.safetensors"}}
    path.write_text(json.dumps(good))
    assert ends(lambda: Checkpoint(tmp_path))

    def prepare(rng: random.Random) -> Callable[[], object]:
        raw = copy.deepcopy(good)
        mutate(rng, raw)
        write_hostile(rng, path, raw)
        return lambda: Checkpoint(tmp_path)

    fuzz("indices", INPUTS, prepare)


def test_adapters(tmp_path: Path) -> None:
    names = ("q_proj", "v_proj")
    modules = [f"base_model.model.model.layers.{n}.self_attn.{name}" for n in range(2) for name in names]
    shapes = {"A": (4, 32), "B": (32, 4)}
    save(
        tmp_path / FILE,
        {f"{module}.lora_{side}.weight": torch.ones(shape) for module in modules for side, shape in shapes.items()},
    )
    config: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(names)}
    config |= {"alpha_pattern": {"q_proj": 3, r"layers\.\d": 4}, "rank_pattern": {"q_proj": 4}, "bias": "none"}
    config |= {"layers_to_transform": [0, 1], "layers_pattern": ["layers"], "exclude_modules": ["lm_head"]}
    good = (tmp_path / FILE).read_bytes()
    patterns = [
        "(" * 500,
        "(a*)*" * 99,
        f"(?P={'x' * 900})",
        ".*" * 400 + "x",
        "a{1,9999}" * 90,
        "(?i)q",
        "[",
        "\\",
        "(?P<index>1)",
        "é" * 999,
    ]

    def whole() -> None:
        for delta in load_adapter(tmp_path).deltas.values():
            delta.matrix()

    def prepare(rng: random.Random) -> Callable[[], object]:
        raw = copy.deepcopy(config)
        if rng.random() < 0.7:
            mutate(rng, raw)
        if rng.random() < 0.3:
            key = rng.choice(["alpha_pattern", "rank_pattern", "target_modules", "exclude_modules", "layers_pattern"])
            raw[key] = (
                {rng.choice(patterns): 4} if key.endswith("_pattern") and key[0] in "ar" else rng.choice(patterns)
            )
        write_hostile(rng, tmp_path / CONFIG, raw)
        (tmp_path / FILE).write_bytes(damaged(rng, good) if rng.random() < 0.4 else good)
        return whole

    assert 0 < fuzz("adapters", INPUTS, prepare) < 1


def test_the_check_sees_what_it_should() -> None:
    def long() -> None:
        raise KvistError("x" * 401)

    def other() -> None:
        raise TypeError("a list for a number")

    for read, kind in ((long, AssertionError), (other, TypeError)):
        with pytest.raises(kind):
            ends(read)
        with pytest.raises(AssertionError, match="raises, input 0: "):
            fuzz("raises", 3, lambda rng, read=read: read)
