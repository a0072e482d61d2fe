"""Blocks in a Redis or Valkey that machines share. What comes from there is checked by whoever reads it, as any record.

Waiting is bounded and nothing is tried twice: a store that is slower than computing is of no use."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kvist.base.errors import ConfigError, install
from kvist.cache.tier import Buffer, TierError

if TYPE_CHECKING:
    from collections.abc import Iterator


PREFIX = "kvist:1:"
_KEPT = 7 * 86_400  # seconds after which the store forgets what nobody uses
_MOST_CONNECTIONS = 4
SCHEMES = ("redis", "rediss", "unix")


class RemoteTier:
    """The store at `url` (redis://, rediss:// or unix://). `timeout`: seconds that it may take for an answer.

    Raises `ConfigError` for a URL that is none, and when the `redis` package is missing; a store that does not answer
    is no error here, as it may do so later.
    """

    name = "remote"

    def __init__(self, url: str, timeout: float = 0.25, clock: Callable[[], float] = time.time) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ConfigError(f"--cache-remote needs the redis package; {install('remote')} brings it") from None
        self._error = redis.RedisError
        self._clock = clock
        shown = without_secrets(url)
        if url.partition("://")[0] not in SCHEMES or "://" not in shown:
            raise ConfigError(f"--cache-remote takes a redis://, rediss:// or unix:// URL, not {shown!r}")
        try:
            self._client: redis.Redis = redis.Redis.from_url(
                url,
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                retry=Retry(NoBackoff(), 0),
                max_connections=_MOST_CONNECTIONS,
                decode_responses=False,
            )
        except (ValueError, redis.RedisError) as error:
            raise ConfigError(f"--cache-remote: {shown!r} cannot be used: {type(error).__name__}") from None
        self.place = shown

    @property
    def budget(self) -> str:
        """What it may take, in words."""
        return f"its own settings say how much it keeps, and {_KEPT // 86_400} days unused are the most"

    def close(self) -> None:
        """See `SharedTier.close`."""
        self._client.close()

    def contains(self, block: str) -> bool | None:
        """Not known without asking around."""
        return None

    def probe(self, block: str) -> bool:
        """See `Tier.probe`."""
        with self._failing("read from"):
            return self._client.exists(PREFIX + block) == 1

    def get(self, block: str, size: int) -> Buffer | None:
        """See `Tier.get`."""
        with self._failing("read from"):
            # One byte more than it may have, so that a longer value is known from a right one; an empty one is none.
            found: Any = self._client.getrange(PREFIX + block, 0, size)
            return found[: size + 1] if isinstance(found, bytes) and found else None

    def put(self, block: str, record: Sequence[Buffer], until: float) -> bool:
        """See `Tier.put`. The store decides itself what it gives up when it is full."""
        with self._failing("write to"):
            self._client.set(PREFIX + block, b"".join(record), ex=self._seconds(until))
            return True

    def pin(self, blocks: Sequence[str], until: float) -> None:
        """See `Tier.pin`."""
        with self._failing("write to"), self._client.pipeline(transaction=False) as pipeline:
            for block in blocks:
                if math.isinf(until):
                    pipeline.persist(PREFIX + block)
                else:
                    pipeline.expire(PREFIX + block, self._seconds(until))
            pipeline.execute(raise_on_error=False)

    def remove(self, block: str) -> None:
        """See `Tier.remove`."""
        with suppress(TierError), self._failing("write to"):
            self._client.delete(PREFIX + block)

    def _seconds(self, until: float) -> int:
        return max(_KEPT, math.ceil(min(until - self._clock(), 10 * _KEPT)))

    def _failing(self, act: str) -> AbstractContextManager[None]:
        return _as_tier_error(f"cannot {act} {self.place}", self._error)


@contextmanager
def _as_tier_error(what: str, kind: type[Exception]) -> "Iterator[None]":
    try:
        yield
    except (kind, OSError, ValueError) as error:
        # The client's own messages may name what the URL holds; its kind says enough.
        raise TierError(f"{what}: {type(error).__name__}") from None


def without_secrets(url: str) -> str:
    """A URL as it may be told: without its password, and without what stands behind its path."""
    try:
        parts = urlsplit(url)
        place = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "a URL that cannot be read"
    return f"{parts.scheme}://{place}{parts.path}"
