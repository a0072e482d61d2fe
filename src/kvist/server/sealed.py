"""Reasoning as clients carry it back: as a signature of its text, or sealed, where they keep no text of it.

Neither is a secret, for the answer shows its reasoning anyway, and neither is a proof: whoever can send a text as
reasoning need not forge it. The digest tells what is ours and whole from what another server wrote.
"""

import base64
import binascii
import hashlib

_PREFIX = "kvist1."
_DIGEST = 24  # bytes


def signature_of(text: str) -> str:
    """Stands for a text, and is never empty. The same text has the same one, on any server."""
    return _PREFIX + base64.b64encode(_digest(text.encode())).decode()


def seal(text: str) -> str:
    """A form of a text that clients give back as it is."""
    data = text.encode()
    return _PREFIX + base64.b64encode(_digest(data) + data).decode()


def unseal(sealed: str) -> str | None:
    """The text; None where `seal` did not make it, or not all of it came back."""
    if not sealed.startswith(_PREFIX):
        return None
    try:
        data = base64.b64decode(sealed.removeprefix(_PREFIX), validate=True)
        text = data[_DIGEST:].decode()
    except (binascii.Error, ValueError):
        return None
    return text if data[:_DIGEST] == _digest(data[_DIGEST:]) else None


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(b"kvist reasoning\0" + data).digest()[:_DIGEST]
