"""Responses that are remembered, so that a later request can go on from one by its id. In memory, and bounded: in
number and in bytes, in all and for each tenant, and in time. Used on the event loop's thread alone."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvist.server.errors import ApiError
from kvist.server.openai.replies import encode
from kvist.server.openai.response_shapes import OutputItem, ResponseObject
from kvist.server.openai.responses_schema import CallItem, InputText, Item, MessageItem, ReasoningItem

SECONDS = 86_400.0  # since one was last asked for
MOST = 1024  # of a tenant
MOST_BYTES = 16 << 20  # of a tenant
MOST_BYTES_IN_ALL = 64 << 20


@dataclass
class Remembered:
    """A response. `turn`: what its own request gave, and what it said; `previous`: the id of the response that it goes
    on from; `nbytes`: the length of its JSON; `used`: when it was last asked for."""

    response: ResponseObject
    turn: tuple[Item, ...]
    previous: str | None
    nbytes: int
    used: float


@dataclass
class _Own:
    """What is remembered of one tenant, the one used longest ago first. `items`: of outputs, by their ids."""

    responses: OrderedDict[str, Remembered] = field(default_factory=OrderedDict)
    items: dict[str, Item] = field(default_factory=dict)
    nbytes: int = 0


class Memory:
    """What is remembered. Each tenant has its own, and knows of no other's.

    The one used longest ago goes first: of a tenant that has too much, or of whoever has the most when all have too
    much together.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._tenants: dict[str, _Own] = {}

    @property
    def nbytes(self) -> int:
        """What is held in all."""
        return sum(own.nbytes for own in self._tenants.values())

    def add(self, tenant: str, response: ResponseObject, given: Sequence[Item], previous: str | None) -> None:
        """Remember a response that is complete; one larger than a tenant's share is not."""
        nbytes = len(encode(response)) + sum(len(item.model_dump_json()) for item in given)
        if nbytes > MOST_BYTES:
            return
        own = self._tenants.setdefault(tenant, _Own())
        said = {item["id"]: as_input(item) for item in response["output"]}
        own.responses[response["id"]] = Remembered(response, (*given, *said.values()), previous, nbytes, self._now())
        own.items |= said
        own.nbytes += nbytes
        while len(own.responses) > MOST or own.nbytes > MOST_BYTES or self._is_old(next(iter(own.responses.values()))):
            self._drop(tenant, next(iter(own.responses)))
        while self.nbytes > MOST_BYTES_IN_ALL:
            # Of what was there before: the new one stays.
            sizes = {name: held.nbytes - (nbytes if name == tenant else 0) for name, held in self._tenants.items()}
            largest = max(sizes, key=sizes.__getitem__)
            self._drop(largest, next(iter(self._tenants[largest].responses)))

    def get(self, tenant: str, response_id: str) -> ResponseObject:
        """Raises `ApiError` (404) for one that is not, or no longer, remembered."""
        found = self._find(tenant, response_id)
        if found is None:
            raise ApiError(404, f"Response with id '{response_id[:100]}' not found.", param="response_id")
        return found.response

    def delete(self, tenant: str, response_id: str) -> None:
        """Forget one. Raises as `get` does."""
        self.get(tenant, response_id)
        self._drop(tenant, response_id)

    def before(self, tenant: str, response_id: str) -> list[Item]:
        """The conversation up to a response, its own output included. Raises `ApiError` (400) where part of it is not
        remembered any more."""
        turns: list[Remembered] = []
        wanted: str | None = response_id
        while wanted is not None:
            found = self._find(tenant, wanted)
            if found is None:
                raise ApiError(
                    400,
                    f"Previous response with id '{wanted[:100]}' not found: send the whole conversation as input.",
                    code="previous_response_not_found",
                    param="previous_response_id",
                )
            turns.append(found)
            wanted = found.previous
        return [item for turn in reversed(turns) for item in turn.turn]

    def item(self, tenant: str, item_id: str, place: str) -> Item:
        """An item of a response's output. Raises `ApiError` (404), which names `place`, where there is none."""
        own = self._tenants.get(tenant)
        if own is None or item_id not in own.items:
            text = f"Item with id '{item_id[:100]}' not found: with store: false none is kept. Send the item itself."
            raise ApiError(404, text, param=place)
        return own.items[item_id]

    def _find(self, tenant: str, response_id: str) -> Remembered | None:
        own = self._tenants.get(tenant)
        found = None if own is None else own.responses.get(response_id)
        if own is None or found is None:
            return None
        if self._is_old(found):
            self._drop(tenant, response_id)
            return None
        found.used = self._now()
        own.responses.move_to_end(response_id)
        return found

    def _is_old(self, found: Remembered) -> bool:
        return self._now() - found.used > SECONDS

    def _drop(self, tenant: str, response_id: str) -> None:
        own = self._tenants[tenant]
        dropped = own.responses.pop(response_id)
        own.nbytes -= dropped.nbytes
        for item in dropped.response["output"]:
            del own.items[item["id"]]
        if not own.responses:
            del self._tenants[tenant]


def as_input(item: OutputItem) -> Item:
    """An item of an answer as a client would send it back. It is not checked again: models may write any name."""
    if item["type"] == "message":
        said = [InputText(type="output_text", text=part["text"]) for part in item["content"]]
        return MessageItem(role="assistant", content=said)
    if item["type"] == "reasoning":
        thought = [InputText(type="reasoning_text", text=part["text"]) for part in item["content"]]
        return ReasoningItem(type="reasoning", content=thought)
    return CallItem.model_construct(
        type="function_call",
        call_id=item["call_id"],
        name=item["name"],
        arguments=item["arguments"],
        namespace=item.get("namespace"),
    )
