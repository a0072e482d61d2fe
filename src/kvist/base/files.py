"""Files that are either whole or absent, and the folder for what can be made again."""

import contextlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from kvist.base.errors import KvistError

MAX_JSON_BYTES = 64 << 20
_PROBE = ".modes"


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


def private_folder(path: Path) -> None:
    """Make a folder that its owner alone may list, with what is missing above it; one of ours that others may enter is
    closed to them. Raises `KvistError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and found.st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise KvistError(f"cannot use the folder {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def atomic_file(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and renamed over `path`, else removed. `mode`: of
    the file, less what the umask denies.

    Order: write, fsync the file, rename, fsync the folder: a reader sees the old file or the new one, whole.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        temporary = name
        allowed = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        yield temporary
        _sync(temporary)
        os.chmod(temporary, allowed)  # whoever wrote it may have put another file there
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
        (temporary / _PROBE).mkdir(0o755)
        allowed = stat.S_IMODE((temporary / _PROBE).stat().st_mode)  # what the umask leaves
        (temporary / _PROBE).rmdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
                os.chmod(file, 0o644 & allowed)
        os.chmod(temporary, allowed)
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
