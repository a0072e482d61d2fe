"""Checkpoints in safetensors form: what is read is what was written, hostile files get one line."""

import json
import os
import re
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import kvist.weights.checkpoint as checkpoint_module
from kvist.base.errors import WeightsError
from kvist.weights.checkpoint import Checkpoint, save


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embedding": torch.randn(40, 16, generator=generator),
        "half": torch.randn(8, 3, 5, generator=generator).half(),
        "brain": torch.randn(7, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
    }


def write_raw(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict[str, str]) -> None:
    for name, content in shards.items():
        save(folder / name, content)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refusal(folder: Path) -> str:
    """The one line with which opening the checkpoint in `folder` is refused."""
    with pytest.raises(WeightsError) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_what_was_saved_is_read_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, tensors(), {"source": "test"})
    oracle = load_file(path)
    assert set(oracle) == set(tensors())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "source": "test"}

    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names() == set(oracle)
    streamed = {name: tensor.clone() for name, tensor in checkpoint.stream(checkpoint.names())}
    targets = {name: torch.full_like(tensor, 9.0) for name, tensor in oracle.items()}
    checkpoint.copy_into(targets)
    for name, expected in oracle.items():
        assert_same(expected, tensors()[name])
        assert checkpoint.shape(name) == tuple(expected.shape)
        assert checkpoint.dtype(name) == expected.dtype
        assert_same(streamed[name], expected)
        assert_same(targets[name], expected)


def test_a_file_is_mapped_anew_and_large_tensors_come_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model.safetensors", tensors())
    checkpoint = Checkpoint(tmp_path)
    opened = []

    def counting_open(path: Path, framework: str):
        opened.append(path)
        return safe_open(path, framework=framework)

    monkeypatch.setattr(checkpoint_module, "safe_open", counting_open)
    monkeypatch.setattr(checkpoint_module, "WINDOW_BYTES", 100)
    targets = {name: torch.full_like(tensor, 9.0) for name, tensor in tensors().items()}
    checkpoint.copy_into(targets)
    assert len(opened) > 20  # 2,560 bytes of embedding by the 64 of one row, a new mapping for each two
    for name, expected in tensors().items():
        assert_same(targets[name], expected)


def test_targets_may_be_views_of_another_dtype_that_require_gradients(tmp_path: Path) -> None:
    weight = tensors()["embedding"]
    save(tmp_path / "model.safetensors", {"weight": weight})
    fused = torch.nn.Parameter(torch.zeros(100, 16, dtype=torch.bfloat16))
    Checkpoint(tmp_path).copy_into({"weight": fused[10:50]})
    assert_same(fused.detach()[10:50], weight.bfloat16())
    assert not fused[:10].any()
    assert not fused[50:].any()

    transposed = torch.zeros(16, 40)
    Checkpoint(tmp_path).copy_into({"weight": transposed.T})
    assert_same(transposed, weight.T)


def test_shards_written_by_transformers_are_read(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2

    checkpoint = Checkpoint(tmp_path)
    expected = model.state_dict()
    assert checkpoint.names() == set(expected)
    targets = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    checkpoint.copy_into(targets)
    for name, tensor in expected.items():
        assert_same(targets[name], tensor)


def test_stream_follows_the_order_of_the_bytes(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", tensors())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = list(file.offset_keys())
    streamed = [name for name, _ in Checkpoint(tmp_path).stream(reversed(stored))]
    assert streamed == stored
    assert [name for name, _ in Checkpoint(tmp_path).stream(stored[1:3])] == stored[1:3]


def test_tensors_that_share_memory_or_are_strided_are_saved(tmp_path: Path) -> None:
    base = tensors()["embedding"]
    given_tensors = {"tied": base, "again": base, "rows": base[3:9], "transposed": base.T}
    save(tmp_path / "model.safetensors", given_tensors)
    stored = load_file(tmp_path / "model.safetensors")
    for name, expected in given_tensors.items():
        assert_same(stored[name], expected)


F32_PAIR = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated or corrupt"),
        (b"\x00" * 4, "truncated or corrupt"),
        (struct.pack("<Q", 1 << 40), "truncated or corrupt"),
        (struct.pack("<Q", 10) + b"{not json}", "truncated or corrupt"),
        (struct.pack("<Q", len(F32_PAIR) + 1) + F32_PAIR + b"}" + b"\0" * 7, "truncated or corrupt"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (
            struct.pack("<Q", 2 * len(F32_PAIR) + 1) + F32_PAIR + b"," + F32_PAIR[1:] + b"}" + b"\0" * 8,
            "the header names 'a' twice",
        ),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    message = refusal(tmp_path)
    assert str(path) in message
    assert reason in message


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_no_damage_to_a_file_gives_anything_but_one_line(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.safetensors"
    save(path, {"a": torch.ones(3, 2), "b": torch.ones(4).bfloat16()})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    message, sizes = "", [0]
    try:
        checkpoint = Checkpoint(tmp_path)
        sizes = [tensor.numel() for _, tensor in checkpoint.stream(checkpoint.names())]
    except WeightsError as error:
        message = str(error)
    assert "\n" not in message
    assert sum(sizes) <= 20


@pytest.mark.parametrize("name", ["../out.safetensors", "/tmp/out.safetensors", "sub/out.safetensors", "out.bin", 3])
def test_an_index_cannot_point_outside_its_folder(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save(tmp_path / "out.safetensors", {"a": torch.ones(2)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert f"{name!r} is not the plain name" in refusal(folder)


def test_an_index_that_names_two_files_for_a_tensor_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {"x.safetensors": {"a": torch.ones(2)}, "y.safetensors": {"b": torch.ones(3)}}, {})
    index = '{"weight_map": {"a": "x.safetensors", "b": "y.safetensors", "a": "y.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert "says 'a' twice, 'x.safetensors' and 'y.safetensors'" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index.replace('"a": "y.', '"a": "x.'))
    assert sorted(Checkpoint(tmp_path).names()) == ["a", "b"]


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    one, two = {"a": torch.ones(2)}, {"b": torch.ones(3)}
    files = {"a": "x.safetensors", "b": "y.safetensors"}

    write_shards(tmp_path, {"x.safetensors": one}, files)
    assert "y.safetensors is missing" in refusal(tmp_path)
    write_shards(tmp_path, {"y.safetensors": {"c": torch.ones(1)}}, files)
    assert re.search(r"y\.safetensors lacks tensor 'b'", refusal(tmp_path))
    write_shards(tmp_path, {"y.safetensors": one | two}, files)
    assert re.search(r"'a' is stored twice: in .*x\.safetensors and in .*y\.safetensors", refusal(tmp_path))
    write_shards(tmp_path, {}, {})
    assert "weight_map" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[1")
    assert "not valid JSON" in refusal(tmp_path)

    write_shards(tmp_path, {"y.safetensors": two}, files)
    assert Checkpoint(tmp_path).names() == {"a", "b"}


def test_a_folder_without_safetensors_says_what_would_work(tmp_path: Path) -> None:
    assert "holds neither model.safetensors" in refusal(tmp_path)
    assert "is not a directory" in refusal(tmp_path / "absent")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    assert "convert to safetensors" in refusal(tmp_path)


def test_a_request_that_does_not_fit_copies_nothing(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "mask": {"dtype": "I64", "shape": [1], "data_offsets": [8, 16]},
        }
    )
    write_raw(tmp_path / "model.safetensors", header.encode(), struct.pack("<ffq", 1.0, 2.0, 3))
    checkpoint = Checkpoint(tmp_path)  # an unsupported tensor that nobody asks for is no error
    target = torch.zeros(2)
    for targets, reason in [
        ({"a": target, "mask": torch.zeros(1)}, "'mask' is of dtype I64, which is not supported"),
        ({"a": target, "b": torch.zeros(2)}, "lacks 1 of 2 tensors: 'b'"),
        ({"a": torch.zeros(2, 1)}, "'a' has shape [2] where the configuration expects [2, 1]"),
    ]:
        with pytest.raises(WeightsError, match=re.escape(reason)):
            checkpoint.copy_into(targets)
        assert not target.any()
    with pytest.raises(WeightsError, match="lacks 1 of 1 tensors: 'b'"):
        checkpoint.stream(["b"])
    with pytest.raises(WeightsError, match="no tensor 'b'"):
        checkpoint.shape("b")
    checkpoint.copy_into({"a": target})
    assert target.tolist() == [1.0, 2.0]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, {"a": torch.ones(2)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(WeightsError, match=r"cannot write .*model.safetensors: .*File too large") as caught:
            save(path, {"a": torch.ones(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(load_file(path)["a"], torch.ones(2))


PEAKS_PROGRAM = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from kvist.weights.checkpoint import Checkpoint

def status(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) << 10

def copy_into(checkpoint, targets):
    checkpoint.copy_into(targets)

def stream(checkpoint, targets):
    for name, tensor in checkpoint.stream(targets):
        targets[name].copy_(tensor)

def whole(checkpoint, targets):
    for name, tensor in load_file(checkpoint.directory / "model.safetensors").items():
        targets[name].copy_(tensor)

def peak(load, folder):
    checkpoint = Checkpoint(folder)
    targets = {name: torch.empty(checkpoint.shape(name)) for name in checkpoint.names()}
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    load(checkpoint, targets)
    assert all(target.ravel()[-1] == 1 for target in targets.values())
    return (status("VmHWM") - before) / sum(target.nbytes for target in targets.values())

torch.set_num_threads(1)
folders = [Path(name) for name in sys.argv[1:]]
ways = (copy_into, stream, whole)
print(json.dumps({load.__name__: [peak(load, folder) for folder in folders] for load in ways}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_loading_holds_the_weights_once(tmp_path: Path) -> None:
    layer = torch.ones(1024, 1024)
    even, uneven = tmp_path / "even", tmp_path / "uneven"
    save(even / "model.safetensors", {f"layer{index}": layer.clone() for index in range(24)})
    layers = {f"layer{index}": layer.clone() for index in range(12)}
    save(uneven / "model.safetensors", layers | {"wte": torch.ones(12 * 1024, 1024)})

    command = [sys.executable, "-c", PEAKS_PROGRAM, str(even), str(uneven)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves the process at once
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peaks = json.loads(done.stdout)
    assert all(1.0 <= ratio < 1.2 for ratio in peaks["copy_into"])
    assert 1.0 <= peaks["stream"][0] < 1.2
    assert min(peaks["whole"]) > 1.8  # the measure sees a second copy where there is one
