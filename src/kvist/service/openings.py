"""How the models were opened that keep a cache in a folder: so that a context can be used without naming its model.

A note lies beside the blocks, private to its user, under the identity that the model has. It is no part of a context,
whose files go to others: where things lie on this machine is nobody else's business."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from kvist.base.errors import KvistError
from kvist.base.files import atomic_file, private_folder, read_json
from kvist.service.identity import Identity
from kvist.service.loaded import Opening

log = logging.getLogger("kvist.cache")

_FOLDER = "openings"
_MOST_BYTES = 1 << 16


def note_opening(folder: Path, identity: Identity, opening: Opening) -> None:
    """Leave a note. It is a convenience: a folder where it cannot lie is told of in the log alone."""
    try:
        private_folder(folder / _FOLDER)
        with atomic_file(_path(folder, identity), 0o600) as target:
            target.write_text(json.dumps(asdict(opening)))
    except KvistError as error:
        log.warning("%s", error)


def find_opening(folder: Path, identity: Identity) -> Opening | None:
    """How the model of that identity was opened last; None where that is not known."""
    path = _path(folder, identity)
    if not path.is_file() or path.is_symlink():
        return None
    try:
        found = read_json(path, _MOST_BYTES)
    except KvistError:
        return None
    names = Opening.__dataclass_fields__
    if found.keys() != names.keys() or not all(isinstance(value, str | None) for value in found.values()):
        return None
    return Opening(**found)


def _path(folder: Path, identity: Identity) -> Path:
    return folder / _FOLDER / f"{identity.digest.hex()[:32]}.json"
