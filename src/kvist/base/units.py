"""Numbers and times as people, and clients, read them."""

import re
from datetime import UTC, datetime

from kvist.base.errors import KvistError

_UNITS = {
    prefix + suffix: base**power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}


def parse_bytes(text: str, what: str) -> int:
    """`2GiB` and `2G` are 2^31, `2GB` is 2 * 10^9. Raises `KvistError` that begins with `what`."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS or (number := int(float(found[1]) * _UNITS[found[2]])) < 1:
        raise KvistError(f"{what} takes a size, as in 512MiB or 2GiB; got {text!r}")
    return number


def format_bytes(count: float) -> str:
    """`1536` → `1.5 KiB`. Binary units; one decimal below 100, none above."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 100 else f"{value:.1f} {units[0]}"


def format_duration(seconds: float) -> str:
    """`75.2` → `1m15s`; below a minute one decimal: `8.4s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def utc_time(seconds: float) -> str:
    """Seconds of the epoch as RFC 3339 has them: `2026-11-30T12:00:00.250000Z`."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def plural(count: int, noun: str) -> str:
    """`(1, "token")` → `1 token`; `(2048, "token")` → `2,048 tokens`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
