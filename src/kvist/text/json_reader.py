"""One JSON value, read character by character, as RFC 8259 has it."""

from enum import Enum, auto

_DEEPEST = 256  # arrays and objects within each other
SPACE = " \t\n\r"
_ESCAPES = '"\\/bfnrt'
_ESCAPED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_WORDS = ("true", "false", "null")
_DIGIT = dict.fromkeys("0123456789")
# A number's states: what may follow each, and where that leads.
_NUMBER: dict[str, dict[str, str]] = {
    "sign": {"0": "zero"} | dict.fromkeys("123456789", "integer"),
    "zero": {".": "point", "e": "exponent", "E": "exponent"},
    "integer": dict.fromkeys(_DIGIT, "integer") | {".": "point", "e": "exponent", "E": "exponent"},
    "point": dict.fromkeys(_DIGIT, "fraction"),
    "fraction": dict.fromkeys(_DIGIT, "fraction") | {"e": "exponent", "E": "exponent"},
    "exponent": {"+": "signed", "-": "signed"} | dict.fromkeys(_DIGIT, "power"),
    "signed": dict.fromkeys(_DIGIT, "power"),
    "power": dict.fromkeys(_DIGIT, "power"),
}
_WHOLE = ("zero", "integer", "fraction", "power")


class Read(Enum):
    """What became of a character."""

    TAKEN = auto()  # it belongs to the value, which goes on
    LAST = auto()  # it belongs to the value and completes it
    AFTER = auto()  # the value, a number, was complete before it
    BAD = auto()  # no JSON value goes on like this


class _Expect(Enum):
    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    NUMBER = auto()
    WORD = auto()


class JsonReader:
    """Push characters until one is not `TAKEN`. Whitespace before the value is taken too.

    `text` is what was read, without whitespace before the value. A control character that stands bare in a string, as
    models write line breaks, is given its escape there, because JSON has no other way to write it, and so is a lone
    surrogate, because UTF-8 has none; all else is as it came.
    """

    def __init__(self) -> None:
        self.first = ""  # character of the value
        self._pieces: list[str] = []
        self._open: list[str] = []  # the brackets that wait to be closed
        self._expect = _Expect.VALUE
        self._is_key = False
        self._number = ""
        self._rest = ""  # of a word
        self._hex = 0  # digits still to come

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, character: str) -> Read:
        read, written = self._read(character), character
        if read in (Read.TAKEN, Read.LAST) and (self.first or character not in SPACE):
            if self._expect is _Expect.STRING and (character < " " or "\ud800" <= character <= "\udfff"):
                written = _ESCAPED.get(character, f"\\u{ord(character):04x}")
            self._pieces.append(written)
            self.first = self.first or character
        return read

    def take(self) -> str:
        """`text`, which is empty from then on."""
        text, self._pieces = self.text, []
        return text

    def _read(self, character: str) -> Read:
        match self._expect:
            case _Expect.STRING:
                return self._in_string(character)
            case _Expect.ESCAPE:
                return self._in_escape(character)
            case _Expect.HEX:
                self._hex -= 1
                if self._hex == 0:
                    self._expect = _Expect.STRING
                return Read.TAKEN if character in "0123456789abcdefABCDEF" else Read.BAD
            case _Expect.NUMBER:
                return self._in_number(character)
            case _Expect.WORD:
                expected, self._rest = self._rest[0], self._rest[1:]
                if character != expected:
                    return Read.BAD
                return Read.TAKEN if self._rest else self._complete()
        if character in SPACE:
            return Read.TAKEN
        match self._expect:
            case _Expect.COLON:
                self._expect = _Expect.VALUE
                return Read.TAKEN if character == ":" else Read.BAD
            case _Expect.COMMA_OR_END if character == ",":
                self._expect = _Expect.KEY if self._open[-1] == "{" else _Expect.VALUE
                return Read.TAKEN
            case _Expect.KEY | _Expect.KEY_OR_END if character == '"':
                self._expect, self._is_key = _Expect.STRING, True
                return Read.TAKEN
            case _Expect.COMMA_OR_END | _Expect.KEY_OR_END | _Expect.VALUE_OR_END if character in "]}":
                return self._close(character)
            case _Expect.VALUE | _Expect.VALUE_OR_END:
                return self._begin(character)
        return Read.BAD

    def _begin(self, character: str) -> Read:
        if character in "{[":
            self._open.append(character)
            self._expect = _Expect.KEY_OR_END if character == "{" else _Expect.VALUE_OR_END
            return Read.TAKEN if len(self._open) <= _DEEPEST else Read.BAD
        if character == '"':
            self._expect, self._is_key = _Expect.STRING, False
            return Read.TAKEN
        if character == "-" or character in _DIGIT:
            self._expect = _Expect.NUMBER
            self._number = "sign" if character == "-" else _NUMBER["sign"][character]
            return Read.TAKEN
        word = next((word for word in _WORDS if word[0] == character), None)
        if word is None:
            return Read.BAD
        self._expect, self._rest = _Expect.WORD, word[1:]
        return Read.TAKEN

    def _in_string(self, character: str) -> Read:
        if character == "\\":
            self._expect = _Expect.ESCAPE
        elif character == '"' and self._is_key:
            self._expect = _Expect.COLON
        elif character == '"':
            return self._complete()
        return Read.TAKEN

    def _in_escape(self, character: str) -> Read:
        if character == "u":
            self._expect, self._hex = _Expect.HEX, 4
            return Read.TAKEN
        self._expect = _Expect.STRING
        return Read.TAKEN if character in _ESCAPES else Read.BAD

    def _in_number(self, character: str) -> Read:
        following = _NUMBER[self._number].get(character)
        if following is not None:
            self._number = following
            return Read.TAKEN
        if self._number not in _WHOLE:
            return Read.BAD
        if not self._open:
            return Read.AFTER
        self._expect = _Expect.COMMA_OR_END
        return self._read(character)

    def _close(self, character: str) -> Read:
        if self._open.pop() + character not in ("{}", "[]"):
            return Read.BAD
        return self._complete()

    def _complete(self) -> Read:
        """A value has ended, the whole one or one within it."""
        if not self._open:
            return Read.LAST
        self._expect = _Expect.COMMA_OR_END
        return Read.TAKEN
