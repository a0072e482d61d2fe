"""Texts from files."""

from pathlib import Path

from kvist.base.errors import TextError

MOST_BYTES = 1 << 26  # of the text


def read_text(path: Path) -> str:
    """The text in `path`. Raises `TextError` when it cannot be read, is no UTF-8, or is larger than `MOST_BYTES`."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise TextError(f"{path} is larger than {MOST_BYTES:,} bytes; a part of it will do")
        return path.read_bytes().decode()
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text: byte {error.start:,} cannot be read") from None
