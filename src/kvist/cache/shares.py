"""Whose room a tier's budget is where several tenants share it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """One tenant's room: that of all its namespaces (the first halves of blocks' names) together.

    Within `part` bytes it always gets room, from whoever holds more than its own part, and nobody takes any of it. What
    others leave free it may have beyond that, up to `limit`, until they come for it.
    """

    namespaces: frozenset[str]
    part: int = 0
    limit: float = math.inf

    @property
    def lasting(self) -> float:
        """How many bytes may stay whatever others do: more cannot be promised to anything that is pinned."""
        return min(self.part or math.inf, self.limit)
