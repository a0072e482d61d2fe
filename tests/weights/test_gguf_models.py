"""Models from GGUF files that the gguf package writes, against the same weights from safetensors."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from kvist.base.errors import ConfigError, KvistError, TextError, WeightsError
from kvist.models.families import read_config
from kvist.models.linear import weights_of
from kvist.models.load import build, export, randomize
from kvist.models.plain import PlainActivations
from kvist.ops import packed
from kvist.runtime.batch import Work
from kvist.service.loaded import Loaded, open_model
from kvist.service.packing import check_memory
from kvist.text.gguf_tokenizer import GgufVocabulary
from kvist.text.gguf_tokenizer import build as build_tokenizer
from kvist.text.tokenizer import Tokenizer
from kvist.weights.checkpoint import SINGLE_FILE, save
from kvist.weights.gguf_header import read_header
from oracle import tokens_of

VOCAB = 96
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": CONFIG | {"model_type": "llama"},
    "llama-tied-linear": CONFIG
    | {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    },
    "qwen2": CONFIG | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": CONFIG | {"model_type": "qwen3", "head_dim": 32},
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128},
}
K_TYPES = CONFIG | {"model_type": "llama", "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gguf", "packing"):
        monkeypatch.setattr(f"kvist.service.{module}.writable_cache_folder", lambda: tmp_path / "cache")


def both(folder: Path, config: dict[str, Any], kinds: Any = Kind.F32, **more: Any) -> tuple[Path, Path]:
    """A directory with safetensors and a GGUF file of the same random weights."""
    model = randomize(build(read_config(config, "test"), PlainActivations(), torch.float32), seed=3, std=0.2)
    tensors = export(model)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    save(folder / "hf" / SINGLE_FILE, tensors)
    return folder / "hf", write_gguf(folder / "model.gguf", tensors, config, kinds, **more)


def logits(loaded: Loaded) -> torch.Tensor:
    runner = loaded.engine(loaded.room(100)).runner
    tokens = tokens_of(random.Random(0), 90, VOCAB)
    return runner.run([Work(runner.manager.open(), tokens, 90)])[0]


@pytest.mark.parametrize("case", CONFIGS)
def test_the_same_model_in_both_forms(case: str, tmp_path: Path) -> None:
    directory, file = both(tmp_path, CONFIGS[case])
    theirs, ours = open_model(str(directory)), open_model(str(file))
    assert {**vars(ours.config)} == {**vars(theirs.config)}
    assert torch.equal(logits(ours), logits(theirs))
    for name, weight in theirs.model.named_parameters():
        assert torch.equal(dict(ours.model.named_parameters())[name], weight), name


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16])
def test_narrow_numbers_stay_what_they_are(kind: Kind, tmp_path: Path) -> None:
    _, file = both(tmp_path, CONFIGS["qwen2"], kind)
    loaded = open_model(str(file))
    assert loaded.model.weights == {Kind.F16: "float16", Kind.BF16: "bfloat16"}[kind]
    assert not loaded.model.is_packed


@pytest.mark.parametrize("case", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q8_0, 8), (Kind.Q4_0, 4)])
def test_groups_of_a_file_stay_what_they_are(kind: Kind, bits: int, case: str, tmp_path: Path) -> None:
    """What the packed weights hold is what the gguf package decodes, to the bit."""
    _, file = both(tmp_path, CONFIGS[case], kind)
    loaded, plain = open_model(str(file)), open_model(str(file), weights="fp32")
    assert loaded.model.weights == f"int{bits}"
    assert loaded.model.packing_loss == 0
    assert not plain.model.is_packed
    for (name, weight), dense in zip(weights_of(loaded.model).items(), weights_of(plain.model).values(), strict=True):
        assert (weight.form.bits, weight.form.group) == (bits, 32)
        assert torch.equal(packed.get_rows(weight.codes, weight.form), dense.weight), name
    ours, theirs = logits(loaded), logits(plain)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05, "activations are rounded to 8 bits"
    again = open_model(str(file))
    assert torch.equal(logits(again), ours)


def test_mixed_types(tmp_path: Path) -> None:
    """As the usual files have them: each matrix by the types that make it."""
    kinds = {"ffn_down": Kind.Q8_0, "attn": Kind.Q4_0, "ffn": Kind.Q4_0, "": Kind.Q8_0}
    kinds = {"attn_v": Kind.Q8_0, **kinds}
    _, file = both(tmp_path, CONFIGS["llama"], kinds)
    loaded = open_model(str(file))
    forms = {name: weight.form for name, weight in weights_of(loaded.model).items()}
    assert (forms["blocks.0.attention.qkv"].bits, forms["blocks.0.attention.qkv"].group) == (8, 64), "mixed"
    assert (forms["blocks.0.attention.out"].bits, forms["blocks.0.gate_up"].bits, forms["blocks.1.down"].bits) == (
        4,
        4,
        8,
    )
    assert loaded.model.weights == "int8+int4"
    assert 0 < loaded.model.packing_loss < 0.006
    plain = logits(open_model(str(file), weights="fp32"))
    assert float((logits(loaded) - plain).norm() / plain.norm()) < 0.05


@pytest.mark.parametrize("weights", ["int8", "int4", "bf16"])
def test_other_weights_than_those_of_the_file(weights: str, tmp_path: Path) -> None:
    _, file = both(tmp_path, CONFIGS["llama"], Kind.Q8_0)
    loaded = open_model(str(file), weights=weights)
    assert loaded.model.weights == {"bf16": "bfloat16"}.get(weights, weights)


def test_k_types_become_eight_bits(tmp_path: Path) -> None:
    """No package writes them; random bytes are as good, as long as their scales are numbers."""
    _, file = both(tmp_path, K_TYPES, Kind.Q8_0)
    header = read_header(file)
    raw, generator = bytearray(file.read_bytes()), random.Random(1)
    for name, tensor in header.tensors.items():
        if len(tensor.shape) == 2:
            # The same number of bytes: of 256 numbers 272 in Q8_0, 210 in Q6_K; the type is patched in the header.
            place = raw.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4 + 16
            struct.pack_into("<I", raw, place, Kind.Q6_K)
            for block in range(tensor.nbytes // 272):
                scale = struct.pack("<e", 0.001)
                start = tensor.start + 210 * block
                raw[start : start + 210] = generator.randbytes(208) + scale
    patched = tmp_path / "k.gguf"
    patched.write_bytes(raw)
    loaded, plain = open_model(str(patched)), open_model(str(patched), weights="fp32")
    assert loaded.model.weights == "int8"
    assert 0 < loaded.model.packing_loss < 0.01
    expected = gguf.GGUFReader(patched)
    tensor = next(t for t in expected.tensors if t.name == "blk.0.ffn_gate.weight")
    decoded = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    assert torch.equal(plain.model.blocks[0].gate_up.weight[:256], decoded)


def test_llama3_factors(tmp_path: Path) -> None:
    factors = [1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0]
    _, file = both(tmp_path, CONFIGS["llama"], factors=factors)
    loaded = open_model(str(file))
    assert loaded.config.rope.divisors == tuple(factors)
    plain = open_model(str(tmp_path / "hf"))
    assert not torch.equal(logits(loaded), logits(plain))
    with pytest.raises(KvistError, match="divisors"):
        open_model(str(write_gguf(tmp_path / "b.gguf", export(plain.model), CONFIGS["llama"], factors=[1.0, 2.0])))


def test_a_file_is_found(tmp_path: Path) -> None:
    _, file = both(tmp_path, CONFIGS["llama"])
    folder = tmp_path / "only"
    folder.mkdir()
    file.rename(folder / "a.gguf")
    assert torch.equal(logits(open_model(str(folder))), logits(open_model(str(folder / "a.gguf"))))
    (folder / "b.gguf").write_bytes((folder / "a.gguf").read_bytes())
    with pytest.raises(WeightsError, match="name one of them"):
        open_model(str(folder))


def test_an_architecture_that_is_not_known(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(KvistError, match="mamba"):
        open_model(str(tmp_path / "x.gguf"))


def test_tensors_of_another_architecture(tmp_path: Path) -> None:
    directory, _ = both(tmp_path, CONFIGS["llama"])
    tensors = export(open_model(str(directory)).model)
    more = write_gguf(
        tmp_path / "more.gguf", tensors | {"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}, CONFIGS["llama"]
    )
    with pytest.raises(WeightsError, match="no place"):
        open_model(str(more))
    fewer = dict(list(tensors.items())[:-2])
    with pytest.raises(WeightsError, match="missing"):
        open_model(str(write_gguf(tmp_path / "fewer.gguf", fewer, CONFIGS["llama"])))


def test_more_than_there_is_memory_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = both(tmp_path, CONFIGS["llama"])
    loaded = open_model(str(file))
    whole = sum(p.nbytes for p in loaded.model.parameters())
    monkeypatch.setattr("kvist.service.packing.free_memory", lambda: whole - 1)
    with pytest.raises(ConfigError, match=r"the weights take .* --weights int8 takes .* --weights int4 takes"):
        open_model(str(file))
    assert open_model(str(file), weights="int8").model.is_packed
    monkeypatch.setattr("kvist.service.packing.free_memory", lambda: 100)
    with pytest.raises(ConfigError, match="even as int4"):
        check_memory(loaded.model, torch.float32, loaded.backend)


TEXTS = ["Hello  world\n\n", "naïve café 東京 123456 🙂", "don't   stop", "\tx = 3.14; // ok", "<|end|>a<|end|>", ""]


def vocabulary_of(backend: Backend, **more: Any) -> GgufVocabulary:
    described = json.loads(backend.to_str())
    ids = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=ids.get)
    special = {token["content"] for token in described["added_tokens"] if token["special"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in described["model"]["merges"]]
    types = [3 if token in special else 1 for token in tokens]
    facts = {"kind": "gpt2", "scores": [], "pre": "gpt-2", "bos": None, "eos": None, "unknown": None}
    ends = {"adds_bos": False, "adds_eos": False, "adds_space": True}
    return GgufVocabulary(**(facts | ends | {"tokens": tokens, "types": types, "merges": merges} | more))


@pytest.fixture(scope="module")
def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    backend.train_from_iterator([*TEXTS, "the world is what the world was, hello hello"] * 4, trainer)
    return backend


def test_byte_level_vocabularies(byte_level: Backend) -> None:
    ours = build_tokenizer(vocabulary_of(byte_level), "test")
    for text in TEXTS:
        assert ours.encode(text).ids == byte_level.encode(text).ids
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    with_bos = build_tokenizer(vocabulary_of(byte_level, bos=0, adds_bos=True), "test")
    assert with_bos.encode("hello").ids == [0, *byte_level.encode("hello").ids]
    assert with_bos.encode("hello", add_special_tokens=False).ids == byte_level.encode("hello").ids


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["12", "345", "Don"]),
        ("qwen2", ["1", "2", "Don"]),
        ("smollm", ["1", "2", "Don"]),
        ("gpt-2", ["12345", "Don"]),
    ],
)
def test_how_a_text_is_cut_first(pre: str, pieces: list[str], byte_level: Backend) -> None:
    ours = build_tokenizer(vocabulary_of(byte_level, pre=pre), "test")
    found = [piece for piece, _ in ours.pre_tokenizer.pre_tokenize_str("12345 Don't")]
    wanted = {"llama-bpe": ["123", "45"], "qwen2": list("12345"), "smollm": list("12345"), "gpt-2": ["12345"]}[pre]
    assert found == [*wanted, "ĠDon", "'t"]
    assert ours.decode(ours.encode("12345 Don't é\n\n x").ids) == "12345 Don't é\n\n x"


def test_how_deepseek_cuts_a_text(byte_level: Backend) -> None:
    """Its punctuation has ASCII's letters in it, and cuts them from others."""
    ours = build_tokenizer(vocabulary_of(byte_level, pre="deepseek-llm"), "test")
    text = "Don't  say x=12345;\r\n\tok, café 東京  "
    found = [text[first:last] for _, (first, last) in ours.pre_tokenizer.pre_tokenize_str(text)]
    assert found == [
        "Don",
        "'",
        "t",
        " ",
        " say",
        " x",
        "=",
        "12345",
        ";",
        "\r",
        "\n",
        "\tok",
        ",",
        " caf",
        "é",
        *" |東京|  ".split("|"),
    ]
    assert ours.decode(ours.encode(text).ids) == text


def test_sentencepiece_vocabularies() -> None:
    """Scores decide what is merged first; bytes stand for characters that there are not."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    words = ["\u2581", "a", "b", "c", "ab", "bc", "abc", "\u2581a", "\u2581ab"]
    scores = [0.0] * len(pieces) + [-9.0, -9.0, -9.0, -9.0, -3.0, -2.0, -5.0, -4.0, -6.0]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    vocabulary = GgufVocabulary(
        "llama",
        [*pieces, *words],
        types,
        scores,
        [],
        "default",
        1,
        2,
        0,
        adds_bos=True,
        adds_eos=False,
        adds_space=True,
    )
    ours = build_tokenizer(vocabulary, "test")
    assert ours.encode("abc").tokens == ["<s>", "\u2581a", "bc"]
    assert ours.encode("ab é").tokens == ["<s>", "\u2581ab", "\u2581", "<0xC3>", "<0xA9>"]
    assert ours.decode(ours.encode("ab é 東").ids) == "ab é 東"
    tokenizer = Tokenizer(ours, {2}, 1)
    assert tokenizer.token_bytes(3 + 0xC3) == b"\xc3"


def test_gemma4_vocabularies() -> None:
    """Merges decide, spaces are characters, and nothing is put before a text but the first token."""
    pieces = ["<pad>", "<bos>", "<unk>", "<turn|>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    words = ["\u2581", "\n", "\n\n", "a", "b", "c", "ab", "bc", "\u2581a", "\u2581ab", "\u2581\u2581"]
    merges = ["\n \n", "\u2581 \u2581", "b c", "\u2581 a", "a b", "\u2581a b"]
    types = [3, 3, 2, 3, *[6] * 256, *[1] * len(words)]
    facts = {"scores": [0.0] * len(types), "merges": merges, "pre": "default", "bos": 1, "eos": 3, "unknown": 2}
    ends = {"adds_bos": True, "adds_eos": False, "adds_space": False}
    ours = build_tokenizer(GgufVocabulary("gemma4", [*pieces, *words], types, **facts, **ends), "test")
    assert ours.encode("abc a").tokens == ["<bos>", "a", "bc", "\u2581a"]
    assert ours.encode("a\n\nab  ab<turn|>").tokens == ["<bos>", *"a \n\n ab \u2581\u2581 ab <turn|>".split(" ")]
    text = " ab é\n 東"
    assert ours.decode(ours.encode(text).ids) == text


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"kind": "wordpiece"}, "wordpiece"),
        ({"pre": "martian"}, "martian"),
        ({"bos": 10**6}, "bos token"),
        ({"types": [1]}, "types"),
        ({"merges": ["q zzz"]}, "merge"),
        ({"tokens": ["a", "a"], "types": [1, 1], "merges": []}, "twice"),
        ({"tokens": [], "types": []}, "no vocabulary"),
    ],
)
def test_vocabularies_that_make_no_tokenizer(more: dict[str, Any], reason: str, byte_level: Backend) -> None:
    with pytest.raises(TextError, match=reason):
        build_tokenizer(vocabulary_of(byte_level, **more), "test")


def test_tokenizer_and_template_of_a_file(tmp_path: Path, byte_level: Backend) -> None:
    from kvist.text.chat import ChatTemplate

    vocabulary = vocabulary_of(byte_level)
    described = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "gpt-2",
        "token_list": vocabulary.tokens,
        "token_types": vocabulary.types,
        "token_merges": vocabulary.merges,
        "eos_token_id": 0,
        "chat_template": "{{ messages[0].content }}!",
    }
    _, file = both(tmp_path, CONFIGS["llama"] | {"vocab_size": len(vocabulary.tokens)}, tokenizer=described)
    loaded = open_model(str(file))
    assert loaded.tokenizer().eos_ids == {0}
    assert loaded.tokenizer().encode("hello world") == byte_level.encode("hello world").ids
    assert ChatTemplate.load(loaded.directory).render([{"role": "user", "content": "hi"}]) == "hi!"
    model = read_config(CONFIGS["llama"] | {"vocab_size": 50}, "test")
    tensors = export(randomize(build(model, PlainActivations(), torch.float32), 1))
    wrong = write_gguf(tmp_path / "wrong.gguf", tensors, CONFIGS["llama"], tokenizer=described)
    with pytest.raises(WeightsError, match="do not belong together"):
        open_model(str(wrong))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    return both(folder, CONFIGS["llama"], Kind.Q8_0)[1].read_bytes()


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_are_refused(data: st.DataObject, whole: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cut, with bits turned and numbers that lie: an error of one line, or a header that fits the file."""
    head = 3000
    raw = bytearray(whole)
    kind = data.draw(st.sampled_from(["cut", "bit", "number"]))
    if kind == "cut":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    elif kind == "bit":
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, head))
            raw[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        number = data.draw(st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
        struct.pack_into("<Q", raw, data.draw(st.integers(0, head)), number)
    path = tmp_path_factory.mktemp("damaged") / "x.gguf"
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except WeightsError as error:
        refusal = str(error)
    else:
        end = max((tensor.start + tensor.nbytes for tensor in header.tensors.values()), default=0)
        assert end <= len(raw)
        return
    assert str(path) in refusal
    assert "\n" not in refusal


def test_whole_models_of_damaged_files(whole: bytes, tmp_path: Path) -> None:
    generator = random.Random(5)
    outcomes = []
    for number in range(60):
        raw = bytearray(whole)
        for _ in range(2):
            raw[generator.randrange(2500)] = generator.randrange(256)
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(raw)
        try:
            open_model(str(path))
            outcomes.append("opened")
        except KvistError:
            outcomes.append("refused")
    assert outcomes.count("refused") > 20
