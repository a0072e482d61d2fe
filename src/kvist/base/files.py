"""Files that are either whole or absent, and the folder for what can be made again."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from kvist.base.errors import KvistError

MAX_JSON_BYTES = 64 << 20


def cache_folder() -> Path:
    """`$KVIST_CACHE`, else `$XDG_CACHE_HOME/kvist`, else `~/.cache/kvist`. Created when something is put there."""
    if chosen := os.environ.get("KVIST_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvist"


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`. Raises `KvistError` naming the file when it is absent, too large or not an object."""
    try:
        if path.stat().st_size > limit:
            raise KvistError(f"{path} is larger than {limit:,} bytes, too large for a JSON file of this kind")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise KvistError(f"{path} does not exist") from None
    except OSError as error:
        raise KvistError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise KvistError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise KvistError(f"{path} holds a JSON {type(value).__name__} where an object is expected")
    return cast(dict[str, Any], value)


@contextlib.contextmanager
def atomic_file(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed over `path`, else removed. `mode`: of
    the file; until then it is its owner's alone.

    Order: write, fsync the file, rename, fsync the folder: a reader sees the old file or the new one, whole.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        _sync(temporary)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise KvistError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it takes the place of `path`, else it is removed.

    The caller has made sure that a folder at `path` may go: it steps aside, and comes back if its successor cannot
    take its place, so that it is never found in part.
    """
    temporary = retired = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
                os.chmod(file, 0o644)
        os.chmod(temporary, 0o755)
        if path.is_dir():
            retired = temporary.with_name(temporary.name + ".old")
            os.replace(path, retired)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise KvistError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if retired is not None and path.exists():
            shutil.rmtree(retired, ignore_errors=True)
        elif retired is not None:
            os.replace(retired, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
