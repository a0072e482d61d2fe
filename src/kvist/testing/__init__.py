"""What authors of plug-ins run in their own tests: the checks that Kvist's own codecs, families and tiers pass.

Each raises `AssertionError` that says in one line what is wrong, where, and with what. See docs/plugins.md.
"""

from kvist.testing.codecs import check_codec
from kvist.testing.families import check_family
from kvist.testing.tiers import check_tier

__all__ = ["check_codec", "check_family", "check_tier"]
