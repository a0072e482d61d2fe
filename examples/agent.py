"""An agent's loop: the model calls tools until it has an answer. What was computed of the conversation stays.

    python examples/agent.py MODEL

for a model that was trained to chat. Where its chat template has no place for tools, they are told of in words.
"""

import datetime
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import kvist

QUESTION = "How many days are there from 2026-11-01 to 2026-12-24?"
MOST_TURNS = 4


def days_between(first: str, last: str) -> int:
    return (datetime.date.fromisoformat(last) - datetime.date.fromisoformat(first)).days


DAY = {"type": "string", "pattern": "20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"}
TOOLS: Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
    "days_between": (
        days_between,
        {
            "description": "The number of days from one date to another.",
            "parameters": {
                "type": "object",
                "properties": {"first": DAY, "last": DAY},
                "required": ["first", "last"],
                "additionalProperties": False,
            },
            "strict": True,
        },
    ),
}


def run(llm: kvist.LLM, question: str, *, max_tokens: int = 200) -> kvist.Answer:
    """The first turn has to call a tool; what follows is the model's decision."""
    tools = [{"name": name, **described} for name, (_, described) in TOOLS.items()]
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    for turn in range(MOST_TURNS):
        choice = "auto" if turn else "required"
        answer = llm.chat(messages, tools=tools, tool_choice=choice, max_tokens=max_tokens)
        print(f"turn {turn}: {answer.usage.computed} tokens computed, {dict(answer.usage.cached)} read")
        if not answer.tool_calls:
            return answer
        messages.append(answer.message)
        for call in answer.tool_calls:
            result = TOOLS[call.name][0](**call.arguments) if call.arguments is not None else "the call was cut short"
            print(f"  {call.name}({call.text}) = {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
    return answer


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("which model? the bundled one knows no digits")
    with kvist.LLM(sys.argv[1], memory="512MiB") as opened:
        print(run(opened, QUESTION).text)
