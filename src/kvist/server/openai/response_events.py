"""A response as the events that build it: its items come one after the other, each begun and ended."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvist.server.openai.replies import TokenLogprob, new_id
from kvist.server.openai.response_shapes import OutputItem, Status
from kvist.server.openai.responses_input import Offered
from kvist.server.sealed import seal
from kvist.text.response import Content, Part, Reasoning, ToolCallArguments, ToolCallBegin, ToolCallEnd

Event = dict[str, Any]


class Items:
    """Cuts the parts of an answer into items. `done` are those that have ended.

    White space alone makes no item: it goes with the text that follows, or is dropped. `offered`: the functions by the
    names that the model knows. `sealed`: reasoning also comes in the form that clients give back as it is.
    """

    def __init__(self, offered: Mapping[str, Offered], sealed: bool = False) -> None:
        self.done: list[OutputItem] = []
        self._offered = offered
        self._sealed = sealed
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] = []  # of the text that is open
        self._pending: list[TokenLogprob] = []  # of tokens whose text has not come yet
        self._blank = ""

    def note(self, logprobs: Sequence[TokenLogprob]) -> None:
        """Entries of tokens; those of text go with the text that comes next."""
        self._pending += logprobs

    def push(self, part: Part) -> list[Event]:
        """The events that a part gives."""
        if not isinstance(part, Content):
            self._pending = []
        match part:
            case Content(text):
                return self._write("message", text)
            case Reasoning(text):
                return self._write("reasoning", text)
            case ToolCallBegin(_, name):
                return self._begin_call(name)
            case ToolCallArguments(_, text):
                self._pieces.append(text)
                return [self._of_item("response.function_call_arguments.delta", {"delta": text})]
            case ToolCallEnd():
                return self.end("completed")

    def finish(self, status: Status) -> list[Event]:
        """End what is open; a call that is open is not complete. An answer without any item has an empty message."""
        if self._open is None:
            return [] if self.done else [*self._begin_text("message"), *self.end(status)]
        return self.end("incomplete" if self._open["type"] == "function_call" else status)

    def end(self, status: Status) -> list[Event]:
        """End the item that is open, if one is."""
        self._blank = ""
        if self._open is None:
            return []
        item, text = self._open, "".join(self._pieces)
        if item["type"] == "function_call":
            item["arguments"] = text
            events = [self._of_item("response.function_call_arguments.done", {"arguments": text})]
        else:
            self._logprobs += self._pending
            part = self._part(text, self._logprobs)
            logprobs = {"logprobs": self._logprobs} if item["type"] == "message" else {}
            events = [
                self._of_part(f"response.{part['type']}.done", {"text": text, **logprobs}),
                self._of_part("response.content_part.done", {"part": part}),
            ]
            item["content"] = [part]
            if self._sealed and item["type"] == "reasoning":
                item["encrypted_content"] = seal(text)
        item["status"] = status
        events.append(self._of_output("response.output_item.done", item))
        self.done.append(item)  # type: ignore[arg-type]  # built field by field
        self._open, self._pending = None, []
        return events

    def _write(self, kind: str, text: str) -> list[Event]:
        events: list[Event] = []
        if self._open is None or self._open["type"] != kind:
            text = self._blank + text
            events = self.end("completed") if self._open is not None else []
            if not text.strip():
                self._blank = text
                return events
            events += self._begin_text(kind)
        self._pieces.append(text)
        if kind == "reasoning":
            return [*events, self._of_part("response.reasoning_text.delta", {"delta": text})]
        entries, self._pending = self._pending, []
        self._logprobs += entries
        return [*events, self._of_part("response.output_text.delta", {"delta": text, "logprobs": entries})]

    def _begin_text(self, kind: str) -> list[Event]:
        if kind == "message":
            item = {"id": new_id("msg_"), "type": kind, "status": "in_progress", "role": "assistant", "content": []}
        else:
            item = {"id": new_id("rs_"), "type": kind, "status": "in_progress", "summary": [], "content": []}
        return [*self._begin(item), self._of_part("response.content_part.added", {"part": self._part("", [])})]

    def _begin_call(self, name: str) -> list[Event]:
        offered = self._offered.get(name)
        item = {
            "id": new_id("fc_"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": new_id("call_"),
            "name": name if offered is None else offered.function.name,
            "arguments": "",
        }
        if offered is not None and offered.namespace is not None:
            item["namespace"] = offered.namespace
        return [*self.end("completed"), *self._begin(item)]

    def _begin(self, item: dict[str, Any]) -> list[Event]:
        self._open, self._pieces, self._logprobs, self._blank = item, [], [], ""
        return [self._of_output("response.output_item.added", dict(item))]

    def _part(self, text: str, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        assert self._open is not None
        if self._open["type"] == "message":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
        return {"type": "reasoning_text", "text": text}

    def _of_output(self, kind: str, item: dict[str, Any]) -> Event:
        return {"type": kind, "output_index": len(self.done), "item": item}

    def _of_item(self, kind: str, fields: Mapping[str, Any]) -> Event:
        assert self._open is not None
        return {"type": kind, "item_id": self._open["id"], "output_index": len(self.done), **fields}

    def _of_part(self, kind: str, fields: Mapping[str, Any]) -> Event:
        return {**self._of_item(kind, fields), "content_index": 0}
