"""What a model's answer consists of, piece by piece."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Content:
    """More of the text that the answer is."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class ToolCallBegin:
    """A call starts. `index`: from 0, in the order in which calls begin."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """More of the JSON text of that call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """That call's arguments are complete: all pieces joined are a JSON object."""

    index: int


Part = Content | Reasoning | ToolCallBegin | ToolCallArguments | ToolCallEnd


def joined(parts: list[Part]) -> list[Part]:
    """The same parts, with pieces of one text that follow each other made into one."""
    result: list[Part] = []
    for part in parts:
        match result[-1] if result else None, part:
            case Content(before), Content(text):
                result[-1] = Content(before + text)
            case Reasoning(before), Reasoning(text):
                result[-1] = Reasoning(before + text)
            case ToolCallArguments(index, before), ToolCallArguments(same, text) if index == same:
                result[-1] = ToolCallArguments(index, before + text)
            case _:
                result.append(part)
    return result
