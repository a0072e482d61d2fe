"""What one client may send to harm the others: requests that take long to read, and connections that only lie there.

A library: `test_attacks.py` sends each once, the soak mixes them in. Each has statuses of which it gets one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Attack:
    """A request of a kind that a server without bounds works on for long. `statuses`: one of these is the answer."""

    name: str
    path: str
    request: Mapping[str, Any]
    statuses: tuple[int, ...]

    @cached_property
    def body(self) -> bytes:
        return json.dumps(self.request, separators=(",", ":")).encode()


def attacks(size: int) -> list[Attack]:
    """All of them, with bodies of about `size` bytes where their length is what harms."""
    words = "a twig is the part of a branch that grows in one season "
    text = words * (size * 9 // 10 // len(words))
    one, ask = {"role": "user", "content": "a"}, [{"role": "user", "content": "twig"}]
    head = {"model": "tiny", "max_tokens": 1}
    messages = [one] * min(size // 40, 12_000)

    def schema(name: str, value: Any, statuses: tuple[int, ...]) -> Attack:
        form = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": value}}
        return Attack(name, "/v1/chat/completions", {**head, "messages": ask, "response_format": form}, statuses)

    def properties(count: int) -> dict[str, Any]:
        return {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(count)}}

    busy = (200, 429)
    divisor = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 999_999_937}}}
    deep = json.loads("[" * 90 + "]" * 90)
    keys = {str(index): 1 for index in range(min(size // 12, 60_000))}
    function = {"name": "f", "parameters": properties(1000), "strict": True}
    return [
        Attack("a long prompt", "/v1/completions", {**head, "prompt": text}, (400, 429)),
        Attack("a prompt of one word", "/v1/completions", {**head, "prompt": "ab" * (size * 4 // 10)}, (400, 429)),
        Attack("a long message", "/v1/chat/completions", {**head, "messages": [{**one, "content": text}]}, (400, 429)),
        Attack(
            "a long message to count",
            "/v1/messages/count_tokens",
            {"model": "tiny", "messages": [{**one, "content": text}]},
            (200, 400, 429),
        ),
        Attack("a long text to tokenize", "/tokenize", {"prompt": text}, (200, 400, 429)),
        Attack("many messages", "/v1/chat/completions", {**head, "messages": messages}, (400, 429)),
        Attack("many values", "/v1/completions", {**head, "prompt": "a", "x": [{}] * (size // 3)}, (413,)),
        Attack(
            "many mistakes", "/v1/completions", {**head, "prompt": [1, *["a"] * min(size // 6, 50_000)]}, (400, 413)
        ),
        Attack(
            "many wrong messages",
            "/v1/chat/completions",
            {**head, "messages": [{}] * min(size // 4, 50_000)},
            (400, 413),
        ),
        schema("a schema with multipleOf", divisor, (400,)),
        schema("a schema of 5,000 properties", properties(5000), (400, 413)),
        schema("a schema of 1,500 properties", properties(1500), (*busy, 400)),
        Attack(
            "a tool of 1,000 properties",
            "/v1/chat/completions",
            {**head, "messages": ask, "tools": [{"type": "function", "function": function}]},
            (*busy, 400),
        ),
        Attack("many embeddings", "/v1/embeddings", {"model": "tiny", "input": ["twig"] * min(size >> 11, 2048)}, busy),
        Attack("many token ids", "/v1/completions", {**head, "prompt": [1] * min(size // 2, 500_000)}, (400, 429)),
        Attack("many short texts", "/v1/completions", {**head, "prompt": ["ab"] * min(size // 8, 60_000)}, (400, 413)),
        Attack("many pieces", "/completion", {"prompt": [1, "ab"] * min(size // 8, 50_000)}, (400, 413, 429)),
        Attack("many fractions", "/v1/completions", {**head, "prompt": [0.5, *[-1.5e-300] * (size // 10)]}, (400, 413)),
        Attack("many lists", "/v1/completions", {**head, "prompt": "a", "x": [deep] * min(size // 180, 700)}, busy),
        Attack("many words of logit_bias", "/v1/completions", {**head, "prompt": "a", "logit_bias": keys}, (400, 413)),
        Attack(
            "long stop strings",
            "/v1/completions",
            {**head, "max_tokens": 16, "prompt": "aaaa", "stop": ["a" * (4000 + index) for index in range(16)]},
            busy,
        ),
    ]
