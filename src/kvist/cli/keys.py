"""API keys and whom they stand for: from options, the environment, and a file.

A line of the file is a key, and perhaps `name=alice requests=4 disk=5GB` behind it, or `name=me operator`; `#` begins a
comment."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from kvist.base.errors import KvistError
from kvist.base.units import parse_bytes
from kvist.service.tenants import Tenant

KEY_VARIABLE = "KVIST_API_KEY"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def api_keys(given: list[str], file: Path | None) -> Mapping[str, Tenant | None]:
    """All keys there are, and whom they stand for where that is said. Raises `KvistError` for a key that no header can
    carry, for a file that has none, and for one that contradicts itself."""
    from kvist.text.reading import read_text

    if "" in given:
        raise KvistError("--api-key is empty; leave it out to serve without one")
    keys: dict[str, Tenant | None] = dict.fromkeys([*given, *filter(None, [os.environ.get(KEY_VARIABLE, "")])])
    if file is not None:
        lines = [line.partition("#")[0].split() for line in read_text(file).splitlines()]
        if not any(lines):
            raise KvistError(f"{file} holds no key; it takes one a line")
        for number, (key, *facts) in ((number, line) for number, line in enumerate(lines, 1) if line):
            tenant = _tenant(facts, f"{file}, line {number}")
            if keys.get(key, tenant) != tenant:
                raise KvistError(f"{file}, line {number}: the same key stands for somebody else already")
            keys[key] = tenant
    for key in keys:
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise KvistError("an API key is made of letters, digits and signs of ASCII, without blanks")
    _check_alike([tenant for tenant in keys.values() if tenant is not None])
    return keys


def _tenant(facts: list[str], where: str) -> Tenant | None:
    found: dict[str, str] = {}
    for fact in facts:
        name, equals, value = fact.partition("=")
        known = name in ("name", "requests", "disk") if equals else name == "operator"
        if not known or name in found:
            raise KvistError(f"{where}: behind a key stand name=, requests=, disk= and operator; got {fact!r}")
        found[name] = value
    if not found:
        return None
    if not _NAME.fullmatch(found.get("name", "")):
        raise KvistError(f"{where}: a name of letters, digits, '.', '_' and '-' is needed, as in name=alice")
    requests = found.get("requests")
    if requests is not None and not (requests.isdecimal() and 0 < int(requests) < 2**31):
        raise KvistError(f"{where}: requests= takes a number of requests, got {requests!r}")
    return Tenant(
        found["name"],
        None if requests is None else int(requests),
        parse_bytes(found["disk"], f"{where}: disk=") if "disk" in found else None,
        "operator" in found,
    )


def _check_alike(tenants: list[Tenant]) -> None:
    first: dict[str, Tenant] = {}
    for tenant in tenants:
        if first.setdefault(tenant.name, tenant) != tenant:
            raise KvistError(f"the keys of {tenant.name} have different limits: give each of them the same")
