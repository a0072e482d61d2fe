"""Which tiers are opened, what is said of them, and who may look at their files."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvist.base.errors import ConfigError, KvistError
from kvist.cli.serve import keep_settings
from kvist.service.keeping import KeepSettings, open_kept
from kvist.service.loaded import open_model

REMOTE = "redis://user:secret@127.0.0.1:1/0"


@pytest.fixture
def mask() -> Iterator[None]:
    old = os.umask(0o022)
    yield
    os.umask(old)


def test_a_remote_alone_touches_no_disk(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("redis")
    loaded = open_model(str(tiny_model))
    monkeypatch.setenv("KVIST_CACHE", str(tmp_path / "cache"))
    settings = keep_settings(None, None, None, REMOTE)
    assert settings is not None
    with open_kept(loaded, settings) as kept:
        assert [tier.name for tier in kept.cache.tiers] == ["remote"]
        (line,) = kept.describe()
        assert "redis://127.0.0.1:1/0" in line
        assert "secret" not in line
        with pytest.raises(ConfigError, match="--cache-disk"):
            _ = kept.disk
    assert not (tmp_path / "cache" / "kv").exists()


def test_each_tier_that_was_asked_for_is_in_the_start_line_with_its_budget(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("redis")
    loaded = open_model(str(tiny_model))
    settings = keep_settings(tmp_path / "kv", "1GiB", None, REMOTE)
    assert settings is not None
    with open_kept(loaded, settings) as kept:
        assert [tier.name for tier in kept.cache.tiers] == ["disk", "remote"]
        disk, remote = kept.describe()
        assert "of 1 GiB" in disk or "of 1.0 GiB" in disk
        assert "its own settings say how much it keeps" in remote


def test_an_age_needs_a_disk() -> None:
    with pytest.raises(KvistError, match="--cache-max-age is for a cache on disk"):
        keep_settings(None, None, "12h", REMOTE)
    assert keep_settings(None, None, None, None) is None


@pytest.mark.usefixtures("mask")
def test_nobody_else_may_list_the_folders_or_read_the_files(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    (folder / "contexts").mkdir(parents=True, mode=0o755)  # as an earlier version left it
    with open_kept(open_model(str(tiny_model)), KeepSettings(folder, 1 << 28)):
        pass
    inner = list(folder.rglob("*"))
    assert {path.name for path in inner if path.is_dir()} >= {"contexts", "identities", "openings"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in inner)
    with open_kept(open_model(str(tiny_model)), KeepSettings(tmp_path / "new" / "kv", 1 << 28)):
        assert (tmp_path / "new" / "kv").stat().st_mode & 0o777 == 0o700
