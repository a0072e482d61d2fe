"""Files and folders that are whole or absent, JSON that is read with one line of complaint, the cache folder."""

import errno
import json
import os
import re
from pathlib import Path

import pytest

from kvist.base import files
from kvist.base.errors import KvistError
from kvist.base.files import (
    atomic_file,
    atomic_folder,
    cache_folder,
    check_own_file,
    make_folders,
    own_folder,
    read_json,
    writable_cache_folder,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def put_file(target: Path, content: bytes, failure: BaseException | None = None) -> None:
    """Write `target` atomically, and fail on the way when told to."""
    with atomic_file(target) as temporary:
        temporary.write_bytes(content)
        if failure is not None:
            raise failure


def put_folder(target: Path, name: str, failure: BaseException | None = None) -> None:
    """Likewise a folder that holds one file, `name`, in a folder of its own."""
    with atomic_folder(target) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / name).write_text(name)
        if failure is not None:
            raise failure


def test_a_file_appears_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.bin"
    with atomic_file(target) as temporary:
        assert temporary.parent == target.parent
        temporary.write_bytes(b"abc")
        assert not target.exists()
    assert target.read_bytes() == b"abc"
    assert names(target.parent) == ["file.bin"]
    assert target.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failure", [RuntimeError("ours"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "file.bin"
    put_file(target, b"old")
    with pytest.raises(type(failure)):
        put_file(target, b"half of the n", failure)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    with pytest.raises(KvistError, match=r"^cannot write .*file\.bin: No space left on device$"):
        put_file(target, b"abc", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KvistError, match=r"cannot write .*: (Not a directory|File exists)"):
        put_file(tmp_path / "file" / "x", b"abc")
    (tmp_path / "folder").mkdir()
    with pytest.raises(KvistError, match=r"cannot write .*folder: Is a directory"):
        put_file(tmp_path / "folder", b"abc")
    assert names(tmp_path) == ["file", "folder"]


def test_the_order_is_write_sync_rename_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file.bin"
    steps: list[tuple[str, bool]] = []
    sync, replace = files._sync, os.replace

    def watched_sync(path: Path) -> None:
        steps.append(("folder" if path.is_dir() else "file", target.exists()))
        sync(path)

    def watched_replace(source: Path, to: Path) -> None:
        steps.append(("rename", target.exists()))
        replace(source, to)

    monkeypatch.setattr(files, "_sync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_replace)
    with atomic_file(target) as temporary:
        temporary.write_bytes(b"abc")
    assert steps == [("file", False), ("rename", False), ("folder", True)]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("first", "second"):
        put_folder(target, name)
        assert names(target / "inner") == [name]
        assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("failure", [RuntimeError("ours"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_folder_whole(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "model"
    put_folder(target, "old")
    with pytest.raises(type(failure)):
        put_folder(target, "new", failure)
    assert names(target / "inner") == ["old"]
    assert names(tmp_path) == ["model"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    put_folder(target, "old")
    replace = os.replace

    def refuse(source: Path, to: Path) -> None:
        if to == target and (source / "inner" / "new").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, to)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(KvistError, match=r"cannot write .*model: No space left on device"):
        put_folder(target, "new")
    assert names(target / "inner") == ["old"]
    assert names(tmp_path) == ["model"]


def test_a_folder_does_not_take_the_place_of_a_file(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.write_text("a file")
    with pytest.raises(KvistError, match=r"cannot write .*model: Not a directory"):
        put_folder(target, "new")
    assert target.read_text() == "a file"
    assert names(tmp_path) == ["model"]


def test_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": [1, "ö"]}))
    assert read_json(path) == {"a": [1, "ö"]}


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": ', "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[1]", "holds a JSON list where an object is expected"),
        (b"null", "holds a JSON NoneType"),
        (b'{"a": "' + b"x" * 200_000 + b'"}', "is larger than 150,000 bytes"),
    ],
)
def test_json_that_is_not_an_object_is_refused_in_one_line(tmp_path: Path, content: bytes, finding: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(KvistError, match=finding) as refusal:
        read_json(path, limit=150_000)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('{"a": 1, "b": 2, "a": 1}', {"a": 1, "b": 2}),
        ('{"a": {"x": [1.5], "y": null}, "a": {"y": null, "x": [1.5]}}', {"a": {"x": [1.5], "y": None}}),
        ('{"x": {"a": "\\u0061", "a": "a"}}', {"x": {"a": "a"}}),
        ('{"x": {"a": 1}, "y": {"a": 2}}', {"x": {"a": 1}, "y": {"a": 2}}),
    ],
)
def test_what_json_says_twice_alike_is_read(tmp_path: Path, content: str, found: dict[str, object]) -> None:
    (tmp_path / "a.json").write_text(content)
    assert read_json(tmp_path / "a.json") == found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1, "a": 2}', "'a' twice, 1 and 2"),
        ('{"a": 1, "a": true}', "'a' twice, 1 and True"),
        ('{"a": 1, "b": 0, "a": null, "a": 1}', "'a' twice, None and 1"),
        ('{"x": [{"\\u0061": 1, "b": 0, "a": [1]}]}', "'a' twice, 1 and [1]"),
        ('{"a": {"b": [1, 2]}, "a": {"b": [2, 1]}}', "'a' twice, {'b': [1, 2]} and {'b': [2, 1]}"),
        (f'{{"{"k" * 9999}": "{"v" * 9999}", "{"k" * 9999}": 2}}', "kkk' twice, 'vvv"),
    ],
)
def test_json_that_contradicts_itself_is_refused_in_one_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(KvistError, match=rf"a\.json says .*{re.escape(said)}") as refusal:
        read_json(tmp_path / "a.json")
    assert len(str(refusal.value).removeprefix(str(tmp_path))) < 300


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(KvistError, match=r"nowhere\.json does not exist"):
        read_json(tmp_path / "nowhere.json")
    with pytest.raises(KvistError, match=r"cannot read .*: Is a directory"):
        read_json(tmp_path)


def test_the_cache_folder_is_chosen_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVIST_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("KVIST_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "kvist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "kvist"
    assert names(tmp_path) == [], "asking for it creates nothing"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")


@needs_root
def test_what_another_user_could_have_written_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    assert own_folder(folder / "kvist" / "ops") == folder / "kvist" / "ops"
    os.chown(folder, 65534, 65534)
    monkeypatch.setenv("KVIST_CACHE", str(folder / "kvist"))
    with pytest.raises(KvistError, match="belongs to another user"):
        cache_folder()
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(KvistError, match="belongs to another user"):
        own_folder(link / "kvist")


@needs_root
def test_a_file_of_another_user_is_not_used(tmp_path: Path) -> None:
    file = tmp_path / "planted.so"
    file.write_bytes(b"")
    check_own_file(file)
    link = tmp_path / "link.so"
    link.symlink_to(file)
    with pytest.raises(KvistError, match="is not a file"):
        check_own_file(link)
    os.chown(file, 65534, 65534)
    with pytest.raises(KvistError, match="belongs to another user"):
        check_own_file(file)


def test_what_everybody_may_write_is_not_used_unless_it_is_sticky(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(KvistError, match="may be written by every user"):
        own_folder(folder / "kvist")
    folder.chmod(0o1777)
    assert own_folder(folder / "kvist") == folder / "kvist"
    file = folder / "kernels.so"
    file.write_bytes(b"")
    file.chmod(0o666)
    with pytest.raises(KvistError, match="may be written by every user"):
        check_own_file(file)


def test_new_folders_are_their_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_folders(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b")] == [0o700, 0o700]


def test_a_cache_folder_that_cannot_be_had_is_one_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVIST_CACHE", str(tmp_path / "file" / "within"))
    folder = writable_cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert writable_cache_folder() == folder
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "made anew at each start" in said
    monkeypatch.setenv("KVIST_CACHE", str(tmp_path / "mine"))
    assert writable_cache_folder() == tmp_path / "mine"
