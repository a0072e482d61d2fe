"""Numbers as people read them, against their definitions."""

import pytest

from kvist.base.units import format_bytes, format_duration, plural


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (100 * 1024, "100 KiB"),
        (32_768 * 1000, "31.2 MiB"),
        (5 * 2**30, "5.0 GiB"),
        (3 * 2**40, "3.0 TiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (8.44, "8.4s"), (60, "1m00s"), (75.2, "1m15s"), (3599.6, "1h00m"), (2 * 3600 + 5 * 60, "2h05m")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_plurals() -> None:
    assert [plural(count, "token") for count in (0, 1, 2048)] == ["0 tokens", "1 token", "2,048 tokens"]
