"""What the metadata of a GGUF file says is as good as a config: ends of turns, rotary scaling, templates, sampling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFValueType as Type
from gguf_tiny import ALPHABET, metadata_of, write
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvist.base.errors import ConfigError, KvistError, TextError
from kvist.models.families import read_config
from kvist.models.gguf import config_of
from kvist.models.layers import inverse_frequencies
from kvist.runtime.request import Sampling
from kvist.service.gguf import open_gguf
from kvist.service.loaded import open_model
from kvist.service.sampling import Proposed, read_proposed
from kvist.text.chat import ChatTemplate
from kvist.text.gguf_tokenizer import TURN_ENDS, turn_ends
from kvist.text.tokenizer import Tokenizer
from kvist.weights.gguf_header import read_header

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gguf", "packing"):
        monkeypatch.setattr(f"kvist.service.{module}.writable_cache_folder", lambda: tmp_path / "cache")


def file_of(folder: Path, kind: str = "gpt2", without: tuple[str, ...] = (), **changed: Any) -> Path:
    """`changed`: keys with __ for a point, each a value and its type."""
    facts = metadata_of(kind) | {key.replace("__", "."): value for key, value in changed.items()}
    return write(
        folder / f"{len(list(folder.iterdir()))}.gguf", {k: v for k, v in facts.items() if k not in without}, 32
    )


def with_tokens(folder: Path, special: list[str], kind: int = 3, **changed: Any) -> Path:
    """Byte-level, with `special` at ids from 259 on."""
    tokens = ["<unk>", "<s>", "</s>", *ALPHABET, *special][: 262 if len(special) < 4 else None]
    types = [2, 3, 3, *[1] * len(ALPHABET), *[kind] * (len(tokens) - 259)]
    facts = {"tokenizer__ggml__tokens": (tokens, Type.ARRAY), "tokenizer__ggml__token_type": (types, Type.ARRAY)}
    scores = {"tokenizer__ggml__scores": ([0.0] * len(tokens), Type.ARRAY)}
    return file_of(folder, **facts, **scores, **changed)


@pytest.mark.parametrize("token", sorted(TURN_ENDS))
@pytest.mark.parametrize("kind", [1, 3])
def test_ends_of_turns_are_known_by_their_text(token: str, kind: int, tmp_path: Path) -> None:
    """No key names them, and some files say of them that they are plain text: they end a turn, and are one token."""
    tokenizer = Tokenizer.load(open_gguf(with_tokens(tmp_path, ["<|other|>", token], kind)).directory)
    assert tokenizer.eos_ids == {2, 260}
    assert 260 in tokenizer.special_ids
    assert tokenizer.encode(f"a{token}b", add_special=False)[1] == 260


def test_a_message_within_an_answer_is_not_its_end() -> None:
    assert turn_ends(["a", "<|end|>", "<|return|>"]) == {"<|end|>": 1, "<|return|>": 2}
    assert turn_ends(["<|end|>", "<|return|>", "<|call|>"]) == {"<|return|>": 1, "<|call|>": 2}
    assert turn_ends(["<|end|>", "<|calls|>", "<|flush|>"]) == {"<|calls|>": 1, "<|flush|>": 2}


@pytest.mark.parametrize("name", ["eos", "eot", "eom"])
def test_ends_that_keys_name(name: str, tmp_path: Path) -> None:
    key = f"tokenizer__ggml__{name}_token_id"
    model = open_gguf(file_of(tmp_path, **{key: (7, Type.UINT32)}))
    assert Tokenizer.load(model.directory).eos_ids == ({7} if name == "eos" else {2, 7})
    with pytest.raises(TextError, match=f"the {name} token is 4000, of 259"):
        open_gguf(file_of(tmp_path, **{key: (4000, Type.UINT32)}))


def test_special_tokens_of_phi3_take_the_white_space_behind_them(tmp_path: Path) -> None:
    """As its own tokenizer does it; GGUF has no key for that."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "\n", "a", "b", "<|end|>", "<|user|>", "<|endoftext|>"]
    facts = {
        "tokenizer__ggml__tokens": (pieces, Type.ARRAY),
        "tokenizer__ggml__token_type": ([2, 3, 3, 1, 1, 1, 1, 3, 3, 3], Type.ARRAY),
        "tokenizer__ggml__scores": ([0.0] * 10, Type.ARRAY),
    }
    text = "<|user|>\na <|end|>\n \n<|endoftext|>\nb"
    for name, wanted in {"Phi 3 Mini": [8, 5, 3, 7, 9, 4, 6], "Other": [8, 4, 5, 3, 7, 4, 3, 4, 9, 4, 6]}.items():
        facts |= {"tokenizer__ggml__add_space_prefix": (False, Type.BOOL), "general__name": (name, Type.STRING)}
        tokenizer = Tokenizer.load(open_gguf(file_of(tmp_path, "llama", **facts)).directory)
        assert tokenizer.encode(text, add_special=False) == wanted


YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 16}


def scaled(folder: Path, **scaling: Any) -> dict[str, Any]:
    kinds = {str: Type.STRING, float: Type.FLOAT32, int: Type.UINT32}
    facts = {f"llama__rope__scaling__{key}": (value, kinds[type(value)]) for key, value in scaling.items()}
    old = tuple(f"llama.rope.scaling.{key}" for key in ("type", "factor", "original_context_length"))
    left = tuple(key for key in old if key.rpartition(".")[2] not in scaling)
    return config_of(read_header(file_of(folder, without=left, **facts)))


@pytest.mark.parametrize(
    ("more", "parameters"),
    [
        ({}, {}),
        ({"yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0}, {"beta_fast": 8.0, "beta_slow": 2.0}),
        ({"yarn_attn_factor": 1.25}, {"attention_factor": 1.25}),
        ({"yarn_ext_factor": 1.0, "finetuned": 1}, {}),
    ],
)
def test_yarn_is_that_of_transformers(more: dict[str, Any], parameters: dict[str, Any], tmp_path: Path) -> None:
    found = scaled(tmp_path, **YARN, **more)
    rope = read_config(found, "test").rope
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    oracle = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters=yarn | parameters,
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](oracle, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(rope, 16), frequencies, rtol=1e-6, atol=0)
    assert rope.yarn.scale == pytest.approx(scale, rel=1e-6)
    plain = 1e4 ** (-torch.arange(0, 16, 2) / 16)
    assert not torch.allclose(inverse_frequencies(rope, 16), plain), "the scaling is in use"


def test_what_multiplies_attention_beside_yarn(tmp_path: Path) -> None:
    """As llama.cpp has it: beside what follows from the factor."""
    usual = read_config(scaled(tmp_path, **YARN), "test").rope.yarn.scale
    assert read_config(scaled(tmp_path, **YARN, attn_factor=1.5), "test").rope.yarn.scale == pytest.approx(1.5 * usual)


def test_the_context_before_yarn_is_the_models_where_no_key_says_it(tmp_path: Path) -> None:
    found = scaled(tmp_path, type="yarn", factor=4.0)
    assert found["rope_parameters"]["original_max_position_embeddings"] == 64


@pytest.mark.parametrize(
    ("scaling", "factor"),
    [
        ({"factor": 4.0}, 4.0),
        ({"type": "linear", "factor": 4.0}, 4.0),
        ({"type": "none", "factor": 4.0}, 1.0),
        ({}, 1.0),
    ],
)
def test_a_factor_alone_divides_all_frequencies(scaling: dict[str, Any], factor: float, tmp_path: Path) -> None:
    assert read_config(scaled(tmp_path, **scaling), "test").rope.linear_factor == factor


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [
        ({**YARN, "yarn_ext_factor": 0.5}, "yarn_ext_factor = 0.5 is not supported"),
        ({**YARN, "yarn_log_multiplier": 0.1}, "yarn_log_multiplier may change the mathematics"),
        ({"type": "dynamic", "factor": 2.0}, "RoPE scaling 'dynamic' is not supported"),
        ({"type": "linear", "factor": 2.0, "attn_factor": 1.5}, "attn_factor = 1.5 is not supported"),
        ({"type": "none", "alpha": 2.0}, "rope.scaling.alpha may change the mathematics"),
        ({"type": "yarn", "factor": float("nan")}, "factor must be finite"),
        ({"type": "yarn", "factor": -1.0}, "factor must be positive"),
    ],
)
def test_rope_keys_that_would_change_the_mathematics(scaling: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(KvistError, match=reason):
        read_config(scaled(tmp_path, **scaling), "test")


def test_named_templates(tmp_path: Path) -> None:
    file = file_of(tmp_path, tokenizer__chat_template__rag=("RAG {{ messages[0].content }}", Type.STRING))
    directory = open_gguf(file).directory
    own = ChatTemplate.load(directory)
    assert own.render(USER) == "hi"
    assert own.render(USER, [{"type": "function"}]) == "tools", "the one called tool_use"
    assert ChatTemplate.load(directory, Path("rag")).render(USER) == "RAG hi"
    assert ChatTemplate.load(directory, Path("tool_use")).render(USER) == "tools"
    with pytest.raises(KvistError, match="unheard"):
        ChatTemplate.load(directory, Path("unheard"))
    named = file_of(
        tmp_path, without=("tokenizer.chat_template",), tokenizer__chat_template__default=("D", Type.STRING)
    )
    assert ChatTemplate.load(open_gguf(named).directory).render(USER) == "D"


@pytest.mark.parametrize(
    "change", [{"without": ("tokenizer.ggml.model",)}, {"tokenizer__ggml__model": ("none", Type.STRING)}]
)
def test_a_file_without_a_tokenizer_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    file = file_of(tmp_path, **change)
    loaded = open_model(str(file))  # it runs all the same, on ids
    with pytest.raises(TextError, match=rf"^{file} holds no tokenizer: the key 'tokenizer.ggml.model' is missing"):
        loaded.tokenizer()
    for key in ("tokenizer.ggml.tokens", "tokenizer.chat_template"):
        lacking = file_of(tmp_path, without=(key,))
        if key == "tokenizer.ggml.tokens":
            with pytest.raises(KvistError, match=rf"{lacking}: the key '{key}' is missing"):
                open_model(str(lacking))
        else:
            assert ChatTemplate.load(open_model(str(lacking)).directory) is None


def test_sampling_that_a_file_proposes(tmp_path: Path) -> None:
    more = {"top_p": (0.75, Type.FLOAT32), "min_p": (0.25, Type.FLOAT32), "penalty_repeat": (1.5, Type.FLOAT32)}
    file = file_of(tmp_path, **{f"general__sampling__{key}": value for key, value in more.items()})
    assert read_proposed(open_gguf(file).directory) == Proposed(0.5, 40, 0.75, 0.25, 1.5)


def test_sampling_that_nobody_proposes_changes_nothing(tmp_path: Path) -> None:
    assert read_proposed(tmp_path) == Proposed()
    assert str(Proposed()) == ""
    assert Proposed().sampling(3) == Sampling(temperature=1.0, seed=3)


def test_sampling_of_a_generation_config(tmp_path: Path) -> None:
    stated = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": -1, "eos_token_id": [1], "min_p": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    found = read_proposed(tmp_path)
    assert found == Proposed(temperature=0.6, top_p=0.9, top_k=0)
    assert str(found) == "temperature 0.6, top_k 0, top_p 0.9"
    assert Proposed(temperature=0.0).over(found) == Proposed(temperature=0.0, top_p=0.9, top_k=0), "zero is said"
    assert found.shown() == {"temperature": 0.6, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.mark.parametrize(
    "stated",
    [
        {"temperature": "hot"},
        {"temperature": -1},
        {"temperature": 10**300},
        {"top_k": 0.5},
        {"top_p": 2},
        {"top_p": [0.9]},
        {"repetition_penalty": True},
        {"min_p": float("nan")},
    ],
)
def test_sampling_that_is_none_is_refused(stated: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    with pytest.raises(ConfigError, match=r"generation_config\.json: "):
        read_proposed(tmp_path)
