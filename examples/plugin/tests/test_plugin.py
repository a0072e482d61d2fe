"""The checks that Kvist's own codecs and tiers pass."""

from pathlib import Path

from kvist_example.int3 import INT3
from kvist_example.sqlite import SqliteTier

from kvist.testing import check_codec, check_tier


def test_int3() -> None:
    check_codec(INT3, error=0.06)


def test_sqlite(tmp_path: Path) -> None:
    def make() -> SqliteTier:
        return SqliteTier(f"sqlite://{tmp_path}/blocks.db?mib=1")

    def closed() -> SqliteTier:
        tier = make()
        tier.close()
        return tier

    check_tier(make, budget=1 << 20, broken=closed)
