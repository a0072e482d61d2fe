"""What a server is told once, at its start."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvist.service.tenants import Tenant


@dataclass(frozen=True)
class ServerSettings:
    """`api_keys`: none means that everybody may ask who reaches the server from a program; pages in a browser may only
    from `origins` ("*": any), and `hosts` are names that the server may be asked under, beside addresses and localhost.
    `tenants`: whom a key stands for, where that is said; any other key is a tenant of its own.

    `max_body_bytes`, `max_values` (8 integers are one): of a request's JSON; `head_timeout`, `body_timeout`: seconds
    in which its head and its body must have arrived. `max_connections`: open at once, or fewer where the process may
    open fewer files. `max_waiting`: requests in the queue before others are refused. `timeout`: seconds that a request
    may take; `grace`: seconds that a shut-down waits for those under way.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    max_values: int = 1 << 16
    max_connections: int = 1024
    head_timeout: float = 30.0
    body_timeout: float = 60.0
    max_waiting: int = 256
    timeout: float = 600.0
    grace: float = 30.0
