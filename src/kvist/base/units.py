"""Numbers and times as people, and clients, read them."""

from datetime import UTC, datetime


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
