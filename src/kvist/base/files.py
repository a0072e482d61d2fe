"""Files that are either whole or absent, and the folder for what can be made again."""

import atexit
import contextlib
import fcntl
import functools
import grp
import json
import os
import pwd
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from kvist.base.errors import KvistError, brief

MAX_JSON_BYTES = 64 << 20
_PROBE = ".modes"


def cache_folder() -> Path:
    """`$KVIST_CACHE`, else `$XDG_CACHE_HOME/kvist`, else `~/.cache/kvist`: links resolved. Created when
    something is put there.

    What lies here is believed, and some of it is run. Raises `KvistError` when another user could have written it.
    """
    if chosen := os.environ.get("KVIST_CACHE"):
        return own_folder(Path(chosen))
    return own_folder(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvist")


def writable_cache_folder() -> Path:
    """`cache_folder()`, for what can be made again; where that cannot be written, or another user could have, a folder
    of this process alone, which is gone when it ends. One line on stderr says so."""
    try:
        folder = cache_folder()
        make_folders(folder)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = f"the folder {folder} cannot be written"
    except KvistError as error:
        reason = str(error)
    except OSError as error:
        reason = f"the folder {error.filename} cannot be made: {error.strerror}"
    return _passing_folder(reason)


@functools.cache
def _passing_folder(reason: str) -> Path:
    folder = tempfile.mkdtemp(prefix="kvist-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    print(f"kvist: {reason}; what would be kept there is made anew at each start", file=sys.stderr)
    return Path(folder)


def own_folder(path: Path) -> Path:
    """The folder with every link resolved, so that what is checked is what is used; it need not be there yet.

    Raises `KvistError` when another user but root could write it or take its place.
    """
    try:
        found = path.resolve()
        for part in [*reversed(found.parents), found]:
            if part.exists() and (reason := _strangers(part.lstat(), stat.S_ISDIR, "a folder")):
                raise KvistError(f"the folder {path} cannot be used: {part} {reason}; name another (KVIST_CACHE)")
    except (OSError, RuntimeError) as error:  # `RuntimeError`: links that lead in a circle
        said = error.strerror if isinstance(error, OSError) else error
        raise KvistError(f"the folder {path} cannot be used: {said}; name another (KVIST_CACHE)") from None
    return found


def make_folders(path: Path) -> None:
    """The folder and those above it; what is made is its owner's alone. Raises `OSError`."""
    for part in [*reversed(path.parents), path]:
        if not part.is_dir():
            part.mkdir(mode=0o700, exist_ok=True)


def check_own_file(path: Path) -> None:
    """Raises `KvistError` unless `path` is a file, no link, that no other user but root could have written."""
    try:
        reason = _strangers(path.lstat(), stat.S_ISREG, "a file")
    except OSError as error:
        raise KvistError(f"cannot read {path}: {error.strerror or error}") from None
    if reason:
        raise KvistError(f"{path} is not used, as it {reason}; delete it, or name another folder in KVIST_CACHE")


def _strangers(found: os.stat_result, is_kind: Callable[[int], bool], kind: str) -> str | None:
    """Why another user may have had a hand in what was found, or None."""
    if not is_kind(found.st_mode):
        return f"is not {kind}"
    if found.st_uid not in (0, os.geteuid()):
        return "belongs to another user"
    if found.st_mode & stat.S_ISVTX and stat.S_ISDIR(found.st_mode):
        return None  # whoever writes there takes nobody's place
    if found.st_mode & stat.S_IWOTH:
        return "may be written by every user"
    if found.st_mode & stat.S_IWGRP and found.st_gid != 0 and not _is_private(found.st_gid):
        return "may be written by its group"
    return None


def _is_private(group: int) -> bool:
    """Whether a group is this user's own, as many systems make one for each user."""
    try:
        found, user = grp.getgrgid(group), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return found.gr_name == user.pw_name and set(found.gr_mem) <= {user.pw_name}


def join(descriptor: int) -> bool:
    """Lock an open file or folder together with others who use it, until it is closed; False where somebody has it
    alone. On file systems without locks there is none."""
    return _lock(descriptor, fcntl.LOCK_SH)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Whether nobody else has the file or folder locked; if so, it is locked meanwhile. Raises `OSError`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield _lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # there are none
        return True
    return True


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`. Raises `KvistError` naming the file when it is absent, too large or not an object, or
    when a key stands in one object twice with values that are not the same."""
    try:
        if path.stat().st_size > limit:
            raise KvistError(f"{path} is larger than {limit:,} bytes, too large for a JSON file of this kind")
        value = json.loads(path.read_bytes(), object_pairs_hook=functools.partial(_object, path))
    except FileNotFoundError:
        raise KvistError(f"{path} does not exist") from None
    except OSError as error:
        raise KvistError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise KvistError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise KvistError(f"{path} holds a JSON {type(value).__name__} where an object is expected")
    return cast(dict[str, Any], value)


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What the pairs of one JSON object say. Others read the first or the last of two that do not agree."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if json.dumps(value, sort_keys=True) != json.dumps(found[key], sort_keys=True):
                raise KvistError(
                    f"{path} says {brief(key)} twice, {brief(value)} and {brief(found[key])}: leave one of them"
                )
    return found


def private_folder(path: Path) -> None:
    """Make a folder that its owner alone may list, with what is missing above it; one of ours that others may enter is
    closed to them. Raises `KvistError`."""
    try:
        make_folders(path)
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
        make_folders(path.parent)
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
        make_folders(path.parent)
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
