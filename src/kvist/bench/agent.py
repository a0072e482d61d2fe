"""An agent's session, replayed: a long prefix of instructions and tool schemas, turn after turn behind it, subagents.

The tokens are random, the lengths drawn from a seed. Agents send all of the history again with every turn; what of it
is computed again is up to the server. What would be necessary is counted from the token sequences themselves: of each
prompt all that no earlier request, with its answer, began with, and of each answer all but its last token."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvist.bench.client import Answer, Client

SUBAGENTS = 2
_SHARED = 0.8  # of the prefix, that a subagent begins with
_NEW = (80, 600)  # tokens that a turn adds: a tool's result, or the user's words
_ANSWER = (24, 96)  # tokens that the model answers
_TASK = (150, 400)  # tokens of a subagent's own instructions

Watch = Callable[[str], None]


@dataclass(frozen=True)
class Turn:
    """`new` tokens are appended to the history, then `answer` tokens are drawn."""

    new: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Thread:
    """A conversation. It begins with `start`; `after`: the turn of the main thread at which it begins."""

    name: str
    start: tuple[int, ...]
    turns: tuple[Turn, ...]
    after: int = 0


@dataclass(frozen=True)
class Session:
    """The main thread and its subagents, which run beside it."""

    main: Thread
    subagents: tuple[Thread, ...]

    @classmethod
    def draw(cls, prefix: int, turns: int, vocab: int, seed: int = 0) -> "Session":
        """A session with a prefix of that many tokens and that many turns of the main thread."""
        rng = random.Random(seed)

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(rng.randrange(vocab) for _ in range(count))

        def draw_turns(count: int) -> tuple[Turn, ...]:
            return tuple(Turn(tokens(rng.randint(*_NEW)), rng.randint(*_ANSWER)) for _ in range(count))

        start = tokens(prefix)
        main = Thread("main", start, draw_turns(turns))
        subagents = []
        for number in range(SUBAGENTS):
            own = start[: int(prefix * _SHARED)] + tokens(rng.randint(*_TASK))
            after = turns * (number + 1) // (SUBAGENTS + 2)
            subagents.append(Thread(f"subagent {number + 1}", own, draw_turns(max(2, turns // 5)), after))
        return cls(main, tuple(subagents))

    @property
    def longest(self) -> int:
        """Tokens of the longest history, answers included."""
        return max(_length(thread) for thread in (self.main, *self.subagents))

    @property
    def distinct(self) -> int:
        """Tokens of all histories together, what they share counted once."""
        shared = int(len(self.main.start) * _SHARED)
        return _length(self.main) + sum(_length(thread) - shared for thread in self.subagents)


@dataclass(frozen=True)
class Asked:
    """One request of a session, in the order in which they were sent."""

    thread: str
    turn: int
    answer: Answer


@dataclass
class Replay:
    """Plays a session against a server. `key`: the API key of each request, by its number."""

    client: Client
    session: Session
    key: Callable[[int], str | None]
    watch: Watch = lambda text: None
    sent: int = 0
    asked: list[Asked] = field(default_factory=list)

    async def run(self, most_turns: int | None = None) -> list[Asked]:
        """All of it, or the first turns of the main thread alone. The requests in the order in which they were sent."""
        started: list[asyncio.Task[None]] = []
        main, turns = self.session.main, self.session.main.turns
        history = list(main.start)
        for number, turn in enumerate(turns if most_turns is None else turns[:most_turns]):
            if most_turns is None:
                started += [
                    asyncio.create_task(self._subagent(thread))
                    for thread in self.session.subagents
                    if thread.after == number
                ]
            await self._ask(main.name, number, history, turn)
        await asyncio.gather(*started)
        return sorted(self.asked, key=lambda asked: asked.answer.sent)

    async def _subagent(self, thread: Thread) -> None:
        history = list(thread.start)
        for number, turn in enumerate(thread.turns):
            await self._ask(thread.name, number, history, turn)

    async def _ask(self, thread: str, number: int, history: list[int], turn: Turn) -> None:
        history += turn.new
        self.watch(f"{thread}, turn {number + 1}: {len(history):,} tokens")
        sent, self.sent = self.sent, self.sent + 1
        answer = await self.client.complete(tuple(history), turn.answer, seed=sent, key=self.key(sent))
        history += answer.tokens
        self.asked.append(Asked(thread, number, answer))


def necessary(answers: Sequence[Answer]) -> list[int]:
    """For each request, in the order in which they were sent, the tokens that an engine with an infinite cache
    computes: of the prompt what no earlier request or its answer began with, at least the last token; of the answer all
    but the last token."""
    known: list[np.ndarray] = []
    counts = []
    for answer in answers:
        prompt = np.array(answer.prompt)
        longest = max((_shared(prompt, other) for other in known), default=0)
        counts.append(len(prompt) - min(longest, len(prompt) - 1) + max(len(answer.tokens) - 1, 0))
        known.append(np.concatenate([prompt, np.array(answer.tokens[:-1], dtype=prompt.dtype)]))
    return counts


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many first tokens are the same."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length


def _length(thread: Thread) -> int:
    return len(thread.start) + sum(len(turn.new) + turn.answer for turn in thread.turns)
