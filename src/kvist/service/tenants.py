"""Who asks: tenants, which share a server and see nothing of each other, and what each may take."""

import hashlib
from dataclasses import dataclass

_NAMELESS = b"kvist tenant"


@dataclass(frozen=True)
class Tenant:
    """Whom an API key stands for, by a name that the operator gives; several keys may stand for one.

    `requests`: how many of its requests may be under way at once; `disk`: bytes that its blocks may take on disk. None:
    no limit of its own. An `operator` may see what all tenants do together: the metrics.
    """

    name: str
    requests: int | None = None
    disk: int | None = None
    operator: bool = False

    @property
    def id(self) -> str:
        """What requests carry. Never the same as that of a key without a name, which is hexadecimal."""
        return f"@{self.name}"


def tenant_id(key: str, tenant: Tenant | None) -> str:
    """What the requests of an API key carry, whoever it stands for: a key without a name is a tenant of its own."""
    if tenant is not None:
        return tenant.id
    return hashlib.blake2b(key.encode(), digest_size=8, person=_NAMELESS).hexdigest()
