"""Tools that Anthropic defines and the client runs: a body names their type alone, so the model is told here what they
are and take. The names and arguments are those of Anthropic's documents; their agents read nothing else."""

import re
from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

_TEXT = {"type": "string"}
_LINE = {"type": "integer", "minimum": 0}
_RANGE = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}


def _object(properties: Mapping[str, Any], *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _commands(properties: Mapping[str, Any], *commands: str) -> Schema:
    return _object({"command": {"type": "string", "enum": list(commands)}, **properties}, "command")


_EDITED = {
    "path": {**_TEXT, "description": "The file or directory."},
    "view_range": {**_RANGE, "description": "For view: the first and the last line; -1 is the end of the file."},
    "file_text": {**_TEXT, "description": "For create: what the file holds."},
    "old_str": {**_TEXT, "description": "For str_replace: the text to replace, which occurs once."},
    "new_str": {**_TEXT, "description": "For str_replace: what stands there then."},
    "insert_line": {**_LINE, "description": "For insert: the line after which the text goes; 0 is the beginning."},
    "insert_text": {**_TEXT, "description": "For insert: the text."},
}
_BASH = (
    "Runs a command in a bash shell that stays between calls, and answers what it prints.",
    _object({"command": _TEXT, "restart": {"type": "boolean", "description": "true: begin a new shell instead."}}),
)
_EDITOR = "Views, creates and edits text files."
_EDITS = ("view", "create", "str_replace", "insert")
# Until May 2025 an edit could be undone, and what was inserted was `new_str`.
_OLD_EDITED = {name: schema for name, schema in _EDITED.items() if name != "insert_text"}
_MEMORY = (
    "Files under /memories that stay from one conversation to the next: look there before you begin.",
    _commands(
        {**_EDITED, "old_path": _TEXT, "new_path": _TEXT},
        *_EDITS,
        "delete",
        "rename",
    ),
)
_KNOWN: Mapping[str, tuple[str, Schema]] = {
    "bash_20241022": _BASH,
    "bash_20250124": _BASH,
    "text_editor_20241022": (_EDITOR, _commands(_OLD_EDITED, *_EDITS, "undo_edit")),
    "text_editor_20250124": (_EDITOR, _commands(_OLD_EDITED, *_EDITS, "undo_edit")),
    "text_editor_20250429": (_EDITOR, _commands(_EDITED, *_EDITS)),
    "text_editor_20250728": (_EDITOR, _commands(_EDITED, *_EDITS)),
    "memory_20250818": _MEMORY,
}


def client_tool(kind: str) -> tuple[str, Schema] | None:
    """The description and the schema of the arguments of a tool of that type; None for a type that is not known. A
    later version of a known one is taken for the latest that is known."""
    if kind in _KNOWN:
        return _KNOWN[kind]
    family = re.sub(r"_\d{8}$", "", kind)
    versions = sorted(known for known in _KNOWN if re.sub(r"_\d{8}$", "", known) == family)
    return _KNOWN[versions[-1]] if versions and kind > versions[-1] else None
