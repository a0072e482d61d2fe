"""An answer taken apart while it streams."""

from kvist.text.response_calls import CallReader, Calls, Progress, Tools, call_reader
from kvist.text.response_parts import Content, Part, Reasoning, joined
from kvist.text.response_template import Field, Found, Kind, Marker, ResponseTemplate, Status

_LONGEST_MARKER = 1024  # characters; what goes on for longer is no marker


class ResponseParser:
    """Push pieces of text as they come, then finish.

    The text is read character by character, so how it is cut changes nothing. Held back is only what may yet turn out
    to be a marker, or whitespace beside one, which is dropped; and the head of a call, until it is known to be one.

    What is no call after all is content, markers and all: when it cannot be read before it begins, and from where it
    cannot be read any more if it has begun. That call, and one that the text ends within, has no `ToolCallEnd`.
    """

    def __init__(self, template: ResponseTemplate, tools: Tools) -> None:
        self._template = template
        self._tools = tools
        self._parts: list[Part] = []
        self._calls = Calls(self._parts)
        self._inside: Field | None = None  # the region that a marker opened; None: what lies between regions
        self._reader: CallReader | None = None  # of the calls in it
        self._opener = ""  # the marker that opened it
        self._told = False  # whether the reader has told of a call
        self._complete = False  # whether its calls are, so that only the closing marker is awaited
        self._before = ""  # the character before `_held`
        self._held = ""
        self._skipped = 0  # characters at the head of `_held` that are not of the answer but of its prompt
        self._silent = False  # whether the character under way is one of them
        self._space = ""  # whitespace that is part of its region only if text follows
        self._beside_marker = False  # whether nothing but whitespace came since a marker
        self._entered = False  # whether the region has text yet
        self._seen: set[str] = set()  # fields that have had text
        self._stayed = False  # whether a marker without characters was taken here

    def skip(self, text: str) -> None:
        """Read what the prompt already holds of the answer: it moves the parser and gives no parts. Before any push."""
        self.push(text)
        self._space, self._skipped = "", len(self._held)

    @property
    def reasons(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._inside is not None and self._inside.kind is Kind.REASONING

    def push(self, text: str) -> list[Part]:
        """The parts that are certain by one more piece."""
        for character in text:
            self._held += character
            self._advance(final=False)
        return self._take()

    def finish(self) -> list[Part]:
        """The rest, when there is no more text. Nothing may be pushed after."""
        self._advance(final=True)
        while self._reader is not None and not self._complete:
            self._close_calls("")
            self._advance(final=True)
        self._append(self._space)
        return self._take()

    def _take(self) -> list[Part]:
        parts = joined(self._parts)
        self._parts.clear()
        return parts

    def _advance(self, final: bool) -> None:
        """Go on until nothing is held, or what is held must wait for more."""
        while self._held:
            if self._complete:
                settled = self._await_close(final)
            elif self._reader is not None and not self._reader.delimited:
                settled = self._read(self._consume(1))
            else:
                settled = self._look(final)
            if not settled:
                return

    # ---- markers

    def _look(self, final: bool) -> bool:
        """Take the marker that the held text begins with, or a character. False: it cannot be told yet."""
        best: tuple[Found, Field | None] | None = None
        for marker, field in self._watched():
            found = self._at(marker, final)
            if found is None:
                return False
            if found.status is Status.FULL and (best is None or found.length > best[0].length):
                best = found, field
        if best is None or (best[0].length == 0 and self._stayed):
            self._route(self._consume(1))
            return True
        found, field = best
        self._stayed = found.length == 0
        text = self._consume(found.length)
        if field is not None:
            self._open(field, text, dict(found.captures))
        elif self._reader is not None:
            self._close_calls(text)
        else:
            self._leave()
        return True

    def _watched(self) -> list[tuple[Marker, Field | None]]:
        """The markers that count here, and the field that each opens; None: it closes the region."""
        region = self._inside or self._template.between
        watched: list[tuple[Marker, Field | None]] = []
        if self._inside is None:
            watched += [(field.open, field) for field in self._template.fields if field.open is not None]
        if region is not None and region.close is not None:
            watched.append((region.close, None))
        return watched

    def _at(self, marker: Marker, final: bool) -> Found | None:
        """Whether the held text begins with the marker; None: it cannot be told yet."""
        found = marker.at(self._before + self._held, len(self._before), final)
        if final or len(self._held) > _LONGEST_MARKER:
            return found
        return None if found.status is Status.PARTIAL or found.may_grow else found

    def _consume(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        if text:
            self._before = text[-1]
        self._silent = self._skipped >= length > 0
        self._skipped = max(0, self._skipped - length)
        return text

    # ---- regions

    def _open(self, field: Field, opener: str, captures: dict[str, str]) -> None:
        self._inside, self._opener, self._entered = field, opener, False
        if field.kind is Kind.CALLS:
            # Whitespace before it stays with the content until it has proved to be a call.
            self._reader, self._told = call_reader(field, opener, captures, self._calls, self._tools), False
        else:
            self._space, self._beside_marker = "", True

    def _leave(self) -> None:
        self._inside, self._reader, self._complete = None, None, False
        self._space, self._beside_marker, self._entered = "", True, False

    def _route(self, character: str) -> None:
        """A character that is no part of a marker."""
        self._stayed = False
        region = self._inside or self._template.between
        if self._reader is not None:
            self._reader.push(character)
        elif self._silent:
            self._beside_marker = self._beside_marker and character.isspace()
        elif region is None or not region.strip:
            self._append(character)
        elif not character.isspace():
            self._append(self._space + character)
            self._space, self._beside_marker = "", False
        elif not self._beside_marker:
            self._space += character

    def _append(self, text: str) -> None:
        region = self._inside or self._template.between
        if region is None or not text:
            return
        if not self._entered and region.name in self._seen:
            text = region.join + text
        self._entered = True
        self._seen.add(region.name)
        self._parts.append(Reasoning(text) if region.kind is Kind.REASONING else Content(text))

    # ---- calls

    def _read(self, character: str) -> bool:
        """A character of calls that are JSON."""
        assert self._reader is not None
        self._stayed = False
        parts = len(self._parts)
        progress = self._reader.push(character)
        self._note_calls(parts)
        if progress is Progress.FAILED:
            self._give_back("")
        elif progress is Progress.DONE:
            self._complete = True
            if self._inside is None or self._inside.close is None:
                self._leave()
        return True

    def _close_calls(self, closer: str) -> None:
        """The closing marker has come, or (empty) the text ends."""
        assert self._reader is not None
        parts = len(self._parts)
        progress = self._reader.close(bool(closer))
        self._note_calls(parts)
        if progress is Progress.FAILED:
            self._give_back(closer)
        else:
            self._leave()

    def _note_calls(self, before: int) -> None:
        if len(self._parts) > before:
            self._told, self._space, self._beside_marker = True, "", True

    def _give_back(self, closer: str) -> None:
        """What the reader could not read is content. It is looked through again, but for the marker that misled, and
        all of it where that had an end."""
        assert self._reader is not None
        raw, known = self._reader.raw, 0 if self._told else len(self._opener)
        if self._reader.delimited:
            raw, known = raw + closer, len(raw + closer)
        self._inside, self._reader, self._entered = None, None, False
        self._silent = False
        for character in raw[:known]:
            self._route(character)
        self._held = raw[known:] + self._held
        self._before = raw[known - 1] if known else ""
        self._stayed = True

    def _await_close(self, final: bool) -> bool:
        """Whitespace and the closing marker after calls that are complete. Without it the region ends all the same."""
        close = self._inside.close if self._inside is not None else None
        assert close is not None
        found = self._at(close, final)
        if found is None:
            return False
        if final and close.at(self._before + self._held, len(self._before)).status is Status.PARTIAL:
            self._consume(len(self._held))  # the answer ends within the marker
            self._leave()
            return True
        if found.status is not Status.FULL and self._held[0].isspace():
            self._consume(1)
            return True
        self._consume(found.length)
        self._leave()
        return True
