"""Models that are split into several GGUF files, against the same weights in one."""

import random
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_gguf

from kvist.base.errors import WeightsError
from kvist.models.families import read_config
from kvist.models.load import build, export, randomize
from kvist.models.plain import PlainActivations
from kvist.runtime.batch import Work
from kvist.service.loaded import open_model
from kvist.weights.checkpoint import stamp_of
from kvist.weights.gguf_header import read_header
from kvist.weights.parts import part_name, part_names
from oracle import tokens_of

VOCAB = 96
CONFIG = {
    "model_type": "llama",
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
HEAD, NORM = "output.weight", "output_norm.weight"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gguf", "packing"):
        monkeypatch.setattr(f"kvist.service.{module}.writable_cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    model = randomize(build(read_config(CONFIG, "test"), PlainActivations(), torch.float32), seed=3, std=0.2)
    return write_gguf(tmp_path / "whole.gguf", export(model), CONFIG, Kind.F32)


def split(whole: Path, groups: list[list[str]], folder: Path, count: int | None = None) -> list[Path]:
    """The tensors of each group in a file of its own; only the first has the model's metadata. `count`: of tensors."""
    reader, paths = gguf.GGUFReader(whole), []
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    folder.mkdir(exist_ok=True)
    for number, names in enumerate(groups):
        path = folder / f"m-{number + 1:05d}-of-{len(groups):05d}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, field in reader.fields.items() if number == 0 else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(groups))
        writer.add_int32("split.tensors.count", len(tensors) if count is None else count)
        for name in names:
            writer.add_tensor(name, np.array(tensors[name].data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def logits(path: Path) -> torch.Tensor:
    loaded = open_model(str(path))
    runner = loaded.engine(loaded.room(100)).runner
    return runner.run([Work(runner.manager.open(), tokens_of(random.Random(0), 90, VOCAB), 90)])[0]


def groups_of(whole: Path, case: str) -> list[list[str]]:
    names = list(read_header(whole).tensors)
    if case in (HEAD, NORM):
        return [[name for name in names if name != case], [case]]
    if case == "nothing in the first":
        return [[], names]
    return [names[:3], names[3:8], names[8:]]


@pytest.mark.parametrize("case", [HEAD, NORM, "three parts", "nothing in the first"])
def test_all_parts_are_read(case: str, whole: Path, tmp_path: Path) -> None:
    first = split(whole, groups_of(whole, case), tmp_path / "parts")[0]
    assert {tensor.path for tensor in read_header(first).tensors.values()} <= set(first.parent.iterdir())
    assert not open_model(str(first)).config.tied
    assert torch.equal(logits(first), logits(whole))
    assert torch.equal(logits(first.parent), logits(whole)), "the folder alone names one model"


@pytest.mark.parametrize("case", [HEAD, NORM, "three parts"])
@pytest.mark.parametrize("lost", [0, -1])
def test_a_part_that_is_missing(case: str, lost: int, whole: Path, tmp_path: Path) -> None:
    paths = split(whole, groups_of(whole, case), tmp_path / "parts")
    paths[lost].unlink()
    with pytest.raises(WeightsError, match=rf"{paths[lost].name} is missing"):
        open_model(str(paths[0].parent))
    named = paths[1] if lost == 0 else paths[0]
    with pytest.raises(WeightsError, match=rf"name the first one, {paths[0].name}|{paths[-1].name} is missing"):
        open_model(str(named))


def test_parts_that_are_not_what_their_names_say(whole: Path, tmp_path: Path) -> None:
    one, two, three = split(whole, groups_of(whole, "three parts"), tmp_path / "parts")
    with pytest.raises(WeightsError, match=rf"is part 2 of 3 of a model; name the first one, {one.name}"):
        open_model(str(two))
    kept = two.read_bytes()
    shutil.copy(three, two)
    with pytest.raises(WeightsError, match=r"says that it is part 3 of 3, and its name 2 of 3"):
        open_model(str(one))
    two.write_bytes(kept)
    named = shutil.copy(one, one.parent / "model.gguf")
    with pytest.raises(WeightsError, match=r"first of 3 parts.* call it model-00001-of-00003\.gguf"):
        open_model(str(named))


def test_parts_that_do_not_make_a_model(whole: Path, tmp_path: Path) -> None:
    groups = groups_of(whole, "three parts")
    twice = split(whole, [groups[0], groups[1], [*groups[2], groups[0][0]]], tmp_path / "twice")
    with pytest.raises(WeightsError, match="stands in another part, too"):
        open_model(str(twice[0]))
    fewer = split(whole, groups[:2], tmp_path / "fewer", count=sum(map(len, groups)))
    with pytest.raises(WeightsError, match=r"its 2 parts hold 8 tensors, and it says 21"):
        open_model(str(fewer[0]))
    foreign = split(whole, [groups[0], groups[1]], tmp_path / "foreign")
    shutil.copy(tmp_path / "twice" / twice[1].name, foreign[1])
    with pytest.raises(WeightsError, match="says that it is part 2 of 3, and its name 2 of 2"):
        open_model(str(foreign[0]))


def test_a_change_of_any_part_is_seen(whole: Path, tmp_path: Path) -> None:
    paths = split(whole, groups_of(whole, "three parts"), tmp_path / "parts")
    stamp = stamp_of(paths[0])
    assert [name for name, *_ in stamp] == [path.name for path in paths]
    paths[2].touch()
    assert stamp_of(paths[0]) != stamp


def test_two_models_in_a_folder(whole: Path, tmp_path: Path) -> None:
    first = split(whole, groups_of(whole, HEAD), tmp_path / "parts")[0]
    shutil.copy(whole, first.parent / "other.gguf")
    with pytest.raises(WeightsError, match=rf"holds 2 models in GGUF; name one of them, as in .*{first.name}"):
        open_model(str(first.parent))


def test_names_of_parts() -> None:
    assert part_names("a-00002-of-00003.gguf") == [f"a-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for alone in ("a.gguf", "a-1-of-2.gguf", "a-00003-of-00002.gguf", "a-00000-of-00002.gguf", "a-00001-of-99999.gguf"):
        assert part_names(alone) == [alone]
    assert part_name("a.gguf", 0, 2) == "a-00001-of-00002.gguf"
    assert part_names("x/q8/a-00001-of-00001.gguf") == ["x/q8/a-00001-of-00001.gguf"]
