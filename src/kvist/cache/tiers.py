"""Tiers that a URL names, by its scheme; docs/plugins.md for those of others."""

from collections.abc import Callable

from kvist.base.errors import ConfigError, KvistError, PluginError
from kvist.base.registry import Registry
from kvist.cache.disk import DiskTier
from kvist.cache.remote import SCHEMES, RemoteTier, without_secrets
from kvist.cache.tier import MEMORY, SharedTier

MakeTier = Callable[[str], SharedTier]

_WORDS = ("name", "place", "budget")
_METHODS = ("contains", "probe", "get", "put", "pin", "remove", "close")


def _refusal(scheme: str, make: MakeTier) -> str | None:
    if not callable(make):
        return "it is nothing that can be called with a URL"
    if not scheme.replace("-", "").replace("+", "").isalnum() or not scheme.isascii() or scheme != scheme.lower():
        return "its name is no scheme of a URL: small letters, digits, '+' and '-'"
    return None


TIERS: Registry[MakeTier] = Registry("tier", "kvist.tiers", _refusal)
for _scheme in SCHEMES:
    TIERS.register(_scheme, RemoteTier)


def register_tier(scheme: str, make: MakeTier, *, version: str) -> None:
    """Have `--cache-remote SCHEME://...` keep blocks in the tier that `make` gives for the whole URL, for as long as
    this process lives. `version` is told, and no part of what is kept: a tier looks into no record. Raises
    `PluginError` for a name that is taken."""
    TIERS.register(scheme, make, version)


def open_tier(url: str) -> SharedTier:
    """The tier at a URL. Raises `ConfigError` for a URL that is none or of an unknown scheme, `PluginError` for a tier
    that cannot be used."""
    scheme, separator, _ = url.partition("://")
    found = TIERS.find(scheme) if separator else None
    if found is None:
        schemes = ", ".join(f"{name}://" for name in TIERS)
        raise ConfigError(f"--cache-remote takes a URL that begins with one of {schemes}; not {without_secrets(url)!r}")
    try:
        tier = found.value(url)
    except KvistError:
        raise
    except Exception as error:  # its words may hold what is secret in the URL
        raise PluginError(f"the tier {scheme!r} of {found.origin} cannot be opened: {type(error).__name__}") from error
    if reason := tier_refusal(tier):
        raise PluginError(f"the tier {scheme!r} of {found.origin} is refused: {reason}")
    return tier


def tier_refusal(tier: SharedTier) -> str | None:
    """Why this is no tier that a URL may name, or None where it is one."""
    for word in _WORDS:
        if not isinstance(getattr(tier, word, None), str):
            return f"its {word} is no text"
    for method in _METHODS:
        if not callable(getattr(tier, method, None)):
            return f"it has no method {method}"
    if tier.name in ("", MEMORY, DiskTier.name):
        return f"its name is {tier.name!r}, which means something else"
    return None
