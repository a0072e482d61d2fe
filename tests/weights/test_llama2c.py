"""llama2.c checkpoints: the converted model computes what llama2.c computes, hostile files get one line."""

import json
import math
import struct
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kvist.base.errors import WeightsError
from kvist.weights.llama2c import convert

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
STORIES = DATA / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no checkpoint at {STORIES}")

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = 24, 36, 2, 4, 2, 270, 16
HEAD_DIM = DIM // HEADS
SHAPES = {
    "embedding": (VOCAB, DIM),
    "attention_norm": (LAYERS, DIM),
    "wq": (LAYERS, DIM, DIM),
    "wk": (LAYERS, KV_HEADS * HEAD_DIM, DIM),
    "wv": (LAYERS, KV_HEADS * HEAD_DIM, DIM),
    "wo": (LAYERS, DIM, DIM),
    "ffn_norm": (LAYERS, DIM),
    "w1": (LAYERS, HIDDEN, DIM),
    "w2": (LAYERS, DIM, HIDDEN),
    "w3": (LAYERS, HIDDEN, DIM),
    "final_norm": (DIM,),
    "rope": (2, CONTEXT, HEAD_DIM // 2),
    "classifier": (VOCAB, DIM),
}


def random_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in SHAPES.items()}


def write_model(path: Path, weights: dict[str, torch.Tensor], tied: bool) -> None:
    header = struct.pack("<7i", DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB if tied else -VOCAB, CONTEXT)
    arrays = [tensor for name, tensor in weights.items() if not (tied and name == "classifier")]
    path.write_bytes(header + b"".join(tensor.numpy().tobytes() for tensor in arrays))


def write_vocabulary(path: Path, last: list[tuple[bytes, float]] | None = None) -> None:
    pieces = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    pieces += [(f"<0x{byte:02X}>".encode(), 0.0) for byte in range(256)]
    pieces += last or [(text, -float(n)) for n, text in enumerate(b"he|l| |e|h|o|lo|\xc3\xa9|w|r|d".split(b"|"))]
    body = b"".join(struct.pack("<fi", score, len(text)) + text for text, score in pieces)
    path.write_bytes(struct.pack("<i", 7) + body)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    write_model(folder / "model.bin", random_weights(), tied=False)
    write_vocabulary(folder / "tok270.bin")
    return folder


def refusal(source: Path, out: Path) -> str:
    """The one line with which a conversion is refused, after which nothing is at `out` or beside it."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(WeightsError) as caught:
        convert(source, out)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


def llama2c_logits(weights: dict[str, torch.Tensor], ids: list[int], head: torch.Tensor) -> torch.Tensor:
    """What llama2.c computes, [tokens, vocab], as it computes it: RoPE rotates neighbours 2i and 2i+1."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        rotated = x.clone()
        for position in range(x.shape[0]):
            for i in range(0, HEAD_DIM, 2):
                angle = position / 10000.0 ** (i / HEAD_DIM)
                cos, sin = math.cos(angle), math.sin(angle)
                even, odd = x[position, :, i], x[position, :, i + 1]
                rotated[position, :, i] = even * cos - odd * sin
                rotated[position, :, i + 1] = even * sin + odd * cos
        return rotated

    tokens = len(ids)
    hidden = weights["embedding"][ids]
    future = torch.ones(tokens, tokens).triu(1).bool()
    for layer in range(LAYERS):
        part = {name: tensor[layer] for name, tensor in weights.items() if len(tensor) == LAYERS}
        x = norm(hidden, part["attention_norm"])
        query = rotate((x @ part["wq"].T).view(tokens, HEADS, HEAD_DIM))
        key = rotate((x @ part["wk"].T).view(tokens, KV_HEADS, HEAD_DIM))
        value = (x @ part["wv"].T).view(tokens, KV_HEADS, HEAD_DIM)
        mixed = []
        for number in range(HEADS):
            shared = number // (HEADS // KV_HEADS)
            scores = query[:, number] @ key[:, shared].T / math.sqrt(HEAD_DIM)
            mixed.append(scores.masked_fill(future, -math.inf).softmax(-1) @ value[:, shared])
        hidden = hidden + torch.cat(mixed, dim=-1) @ part["wo"].T
        x = norm(hidden, part["ffn_norm"])
        hidden = hidden + (torch.nn.functional.silu(x @ part["w1"].T) * (x @ part["w3"].T)) @ part["w2"].T
    return norm(hidden, weights["final_norm"]) @ head.T


def piecewise_bpe(vocabulary: list[tuple[bytes, float]], text: str) -> list[int]:
    """llama2.c's encoder: merge the neighbours whose union scores best, until no union is a piece."""
    ids = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    out = [ids[b" "]] if text else []
    for character in text:
        raw = character.encode()
        out += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        unions = [ids.get(vocabulary[a][0] + vocabulary[b][0]) for a, b in pairwise(out)]
        known = [(vocabulary[union][1], -place, union) for place, union in enumerate(unions) if union is not None]
        if not known:
            return [1, *out]
        _, place, union = max(known)
        out[-place : -place + 2] = [union]


@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_model_computes_what_llama2c_computes(source: Path, tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    weights = random_weights()
    write_model(source / "model.bin", weights, tied)
    out = tmp_path / "out"
    convert(source, out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not tied

    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    ids = [1, 260, 7, 269, 33, 260, 12, 100]
    with torch.no_grad():
        actual = model(torch.tensor([ids])).logits[0]
    head = weights["embedding"] if tied else weights["classifier"]
    torch.testing.assert_close(actual, llama2c_logits(weights, ids, head), rtol=1e-4, atol=1e-4)
    wrong = llama2c_logits(weights | {"wq": weights["wk"].repeat(1, 2, 1)}, ids, head)
    assert (actual - wrong).abs().max() > 0.1


@needs_stories
def test_the_real_checkpoint_tells_a_story(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert(STORIES, tmp_path / "stories")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "stories")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stories")
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert prompt[0, 0] == 1
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False, pad_token_id=0
    )
    story = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert story.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")


@needs_stories
def test_the_tokenizer_encodes_as_llama2c_does_and_text_survives(tmp_path: Path) -> None:
    convert(STORIES / "stories260K.bin", tmp_path / "stories")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "stories" / "tokenizer.json"))
    raw = (STORIES / "tok512.bin").read_bytes()
    vocabulary, offset = [], 4
    while offset < len(raw):
        score, length = struct.unpack_from("<fi", raw, offset)
        vocabulary.append((raw[offset + 8 : offset + 8 + length], score))
        offset += 8 + length
    assert len(vocabulary) == tokenizer.get_vocab_size() == 512

    corpus = (DATA / "tinyshakespeare.txt").read_text()
    texts = [corpus[start : start + 150] for start in range(0, 30_000, 150)]
    texts += ["", " ", "  two  spaces ", "\n\t", "naïve café ∑ 日本 🙂", "<0x41> Once upon a time"]
    for text in texts:
        ids = tokenizer.encode(text).ids
        assert ids == piecewise_bpe(vocabulary, text)
        assert tokenizer.decode(ids) == text


def test_a_conversion_writes_whole_directories_only_where_there_is_none(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    convert(source, out)
    names = {path.name for path in out.iterdir()}
    assert names == {"model.safetensors", "config.json", "generation_config.json"} | {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "is not an empty directory" in refusal(source, out)
    assert {path.name for path in out.iterdir()} == names
    (tmp_path / "file").write_text("kept")
    assert "is not an empty directory" in refusal(source, tmp_path / "file")


def test_a_source_must_hold_one_model_and_one_vocabulary(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "does not exist" in refusal(tmp_path / "absent", out)
    (source / "second.bin").write_bytes(b"")
    assert "one llama2.c model file (*.bin), found model.bin, second.bin" in refusal(source, out)
    (source / "tok270.bin").unlink()
    assert "one llama2.c vocabulary file (tok*.bin), found none" in refusal(source / "model.bin", out)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ((0, 36, 2, 4, 2, 270, 16), "its header holds"),
        ((24, 36, 2, 4, 2, -0, 16), "its header holds"),
        ((24, 36, 2, 4, 2, 270, -1), "its header holds"),
        ((25, 36, 2, 4, 2, 270, 16), "do not divide"),
        ((24, 36, 2, 4, 3, 270, 16), "do not divide"),
        ((28, 36, 2, 4, 2, 270, 16), "do not divide"),
        ((2**31 - 2, 2**31 - 1, 2**31 - 1, 1, 1, 2**31 - 1, 2**31 - 1), "where its header implies"),
        ((24, 36, 2, 4, 2, -271, 16), "where its header implies"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(
    source: Path, tmp_path: Path, header: tuple[int, ...], reason: str
) -> None:
    path = source / "model.bin"
    path.write_bytes(struct.pack("<7i", *header) + path.read_bytes()[28:])
    message = refusal(source, tmp_path / "out")
    assert str(path) in message
    assert reason in message


def test_other_kinds_of_model_files_are_named(source: Path, tmp_path: Path) -> None:
    path = source / "model.bin"
    content = path.read_bytes()
    path.write_bytes(content[:20])
    assert "too short" in refusal(source, tmp_path / "out")
    path.write_bytes(content[:-4])
    assert "where its header implies" in refusal(source, tmp_path / "out")
    path.write_bytes(struct.pack("<I", 0x616B3432) + content)
    assert "--version 0" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda raw: raw[:-3], "corrupt at piece 269"),
        (lambda raw: raw + b"x", "more than the model's 270 tokens"),
        (lambda raw: raw[:4] + struct.pack("<fi", 0.0, 2**30) + raw[12:], "corrupt at piece 0"),
        (lambda raw: raw[:4] + struct.pack("<fi", 0.0, -5) + raw[12:], "corrupt at piece 0"),
        (lambda raw: raw[:4] + struct.pack("<fi", math.nan, 5) + raw[12:], "corrupt at piece 0"),
        (lambda raw: raw[:-1] + b"\xff", "piece 269 is not UTF-8"),
        (lambda raw: raw[:-1] + b"r", "a piece repeats"),
        (lambda raw: raw.replace(b"<0x41>", b"<0x4Z>"), "ids 3 to 258 are not the bytes"),
        (lambda raw: raw[:1000], "too few for the model's 270 tokens"),
    ],
)
def test_a_damaged_vocabulary_is_refused(source: Path, tmp_path: Path, damage, reason: str) -> None:
    path = source / "tok270.bin"
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(source, tmp_path / "out")
    assert str(path) in message
    assert reason in message


@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_no_damage_gives_anything_but_one_line(source: Path, tmp_path: Path, data: st.DataObject) -> None:
    write_vocabulary(source / "tok270.bin")
    content = bytearray((source / "tok270.bin").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (source / "tok270.bin").write_bytes(content)
    out = Path(tempfile.mkdtemp(dir=tmp_path)) / "out"
    message = ""
    try:
        convert(source, out)
    except WeightsError as error:
        message = str(error)
    assert "\n" not in message
    assert out.exists() is not bool(message)
