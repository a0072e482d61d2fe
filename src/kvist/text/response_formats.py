"""The known ways in which models write reasoning and calls of tools.

They are written in the vocabulary of transformers' response templates ("Response Parsing" in its documentation), so
that a format here and one that a checkpoint brings along are read by the same code. Beside each stands what a chat
template's text must hold for its model to be of that format.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallSyntax:
    """How a model writes calls, for whoever makes it write them.

    Calls are `first`, the calls with `between` in between, and `last`. A call is `before`, the tool's name, `middle`,
    the arguments, `after`. The arguments are a JSON object; where `parameter` has its three texts, each argument is the
    first, its key, the second, its value (a string as it is, anything else as JSON), the third. `trigger`: the text by
    which a call is known to begin within other text; None: nothing tells, so calls are the whole answer. `ending`: a
    pattern of what within a string would be taken for its end, where strings stand as they are.
    """

    before: str
    middle: str
    after: str
    first: str = ""
    between: str = ""
    last: str = ""
    trigger: str | None = None
    parameter: tuple[str, str, str] | None = None
    ending: str = ""


@dataclass(frozen=True)
class KnownFormat:
    """`template`: without an anchor, which is the chat template's. `tells`: a chat template that holds all texts of one
    of these tuples is of this format."""

    template: Mapping[str, Any]
    calls: CallSyntax | None
    tells: tuple[tuple[str, ...], ...]


_THINK = {"open": "<think>", "close": "</think>"}
_FROM_OBJECT = {"type": "function", "function": "{content}"}
_FROM_MARKER = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_TEXT = {"content": "text"}

# The order is the order in which they are told: a format whose marks contain another's comes first.
KNOWN: dict[str, KnownFormat] = {
    # Qwen3-Coder, Qwen3.5: each argument is a tag of its own. They sometimes leave out the outer one.
    "qwen3-coder": KnownFormat(
        {
            "fields": {
                "reasoning_content": _THINK,
                "tool_calls": {
                    "open_pattern": r"(?:<tool_call>\s*)?<function=(?P<name>[^>\n]+)>",
                    # A text may hold the end of a tag or of a call: it counts only where one can be.
                    "close_pattern": r"\n?</parameter>\s*</function>(?:\s*</tool_call>)?"
                    r"|(?<=>)\s*</function>(?:\s*</tool_call>|(?=\s*(?:<tool_call>|<function=|\Z)))",
                    "repeats": True,
                    "content": "xml-inline",
                    "content_args": {
                        "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)"
                        r"(?:\n?</parameter>(?=\s*<parameter=|\s*\Z)|\Z)",
                    },
                    "transform": _FROM_MARKER,
                },
                "content": _TEXT,
            },
        },
        CallSyntax(
            before="<tool_call>\n<function=",
            middle=">\n",
            after="</function>\n</tool_call>",
            between="\n",
            trigger="<tool_call>",
            parameter=("<parameter=", ">\n", "\n</parameter>\n"),
            ending=r"<\/parameter>\s*(<parameter=|<\/function>)|>\s*<\/function>\s*(<\/?tool_call>|<function=)",
        ),
        (("<tool_call>", "<function=", "<parameter="),),
    ),
    # Hermes 2 and 3, Qwen2.5, Qwen3, SmolLM3.
    "hermes": KnownFormat(
        {
            "fields": {
                "reasoning_content": _THINK,
                "tool_calls": {
                    "open": "<tool_call>",
                    "close": "</tool_call>",
                    "repeats": True,
                    "content": "json",
                    "transform": _FROM_OBJECT,
                },
                "content": _TEXT,
            },
        },
        CallSyntax(
            before='<tool_call>\n{"name": "',
            middle='", "arguments": ',
            after="}\n</tool_call>",
            between="\n",
            trigger="<tool_call>",
        ),
        (("<tool_call>",),),
    ),
    # DeepSeek R1 and V3, whose arguments stand in a block of Markdown; V3.1, whose do not.
    "deepseek": KnownFormat(
        {
            "fields": {
                "reasoning_content": _THINK,
                "tool_calls": {
                    "open_pattern": r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>"
                    r"(?P<name>[^<\n]+)\n```json\n|(?P<name>[^<\n]+)<｜tool▁sep｜>)",
                    "close_pattern": r"(?:```)?<｜tool▁call▁end｜>(?:\s*<｜tool▁calls▁end｜>)?",
                    "repeats": True,
                    "content": "json",
                    "transform": _FROM_MARKER,
                },
                "content": _TEXT,
            },
        },
        CallSyntax(
            before="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            middle="\n```json\n",
            after="\n```<｜tool▁call▁end｜>",
            first="<｜tool▁calls▁begin｜>",
            between="\n",
            last="<｜tool▁calls▁end｜>",
            trigger="<｜tool▁calls▁begin｜>",
        ),
        (("<｜tool▁call▁begin｜>",),),
    ),
    # Mistral's tokenizers from v11 on: Mistral Small 3.2, Magistral, Devstral.
    "mistral-args": KnownFormat(
        {
            "fields": {
                "reasoning_content": {"open": "[THINK]", "close": "[/THINK]"},
                "tool_calls": {
                    "open_pattern": r"\[TOOL_CALLS\](?P<name>[^\[\{\s]+)(?:\[CALL_ID\][^\[\{]*)?(?:\[ARGS\])?(?=\s*\{)",
                    "repeats": True,
                    "content": "json",
                    "transform": _FROM_MARKER,
                },
                "content": _TEXT,
            },
        },
        CallSyntax(before="[TOOL_CALLS]", middle="[ARGS]", after="", trigger="[TOOL_CALLS]"),
        (("[TOOL_CALLS]", "[ARGS]"),),
    ),
    # Mistral's tokenizers v3 to v7: Mistral 7B v0.3, Nemo, Mistral Large.
    "mistral": KnownFormat(
        {
            "fields": {
                "reasoning_content": {"open": "[THINK]", "close": "[/THINK]"},
                "tool_calls": {
                    "open": "[TOOL_CALLS]",
                    "content": "json",
                    "transform_each": True,
                    "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
                },
                "content": _TEXT,
            },
        },
        CallSyntax(
            before='{"name": "',
            middle='", "arguments": ',
            after="}",
            first="[TOOL_CALLS][",
            between=", ",
            last="]",
            trigger="[TOOL_CALLS]",
        ),
        (("[TOOL_CALLS]",),),
    ),
    # gpt-oss ("harmony"): each message says in its header what it is.
    "gpt-oss": KnownFormat(
        {
            "fields": {
                "reasoning_content": {"open": "<|channel|>analysis<|message|>", "close": "<|end|>"},
                # Whatever else it writes; what only says where a message begins and ends is left out.
                "content": {
                    "close": [
                        "<|start|>assistant",
                        "<|channel|>final<|message|>",
                        "<|channel|>commentary<|message|>",
                        "<|end|>",
                        "<|return|>",
                    ],
                },
                "tool_calls": {
                    "open_pattern": r"(?:<\|channel\|>commentary to=functions\.(?P<name>[\w.-]+)"
                    r"| to=functions\.(?P<name>[\w.-]+)<\|channel\|>commentary)"
                    r"[^<]*(?:<\|constrain\|>\w+)?<\|message\|>",
                    "close": "<|call|>",
                    "repeats": True,
                    "content": "json",
                    "transform": _FROM_MARKER,
                },
            },
        },
        CallSyntax(
            before="<|channel|>commentary to=functions.",
            middle=" <|constrain|>json<|message|>",
            after="<|call|>",
            trigger="<|channel|>commentary to=functions.",
        ),
        (("<|channel|>", "<|message|>"),),
    ),
    # Llama 3.1 to 3.3: the call is the whole answer, without a mark, or after <|python_tag|>.
    "llama3-json": KnownFormat(
        {
            "fields": {
                "tool_calls": {
                    "open_pattern": r"(?:^\s*|<\|python_tag\|>\s*|;\s*)(?=\{\s*\"(?:name|type)\"\s*:)",
                    "repeats": True,
                    "content": "json",
                    "transform": {
                        "type": "function",
                        "function": {"name": "{content.name}", "arguments": "{content.parameters}"},
                    },
                },
                "content": _TEXT,
            },
        },
        CallSyntax(before='{"name": "', middle='", "parameters": ', after="}", between="; "),
        (("<|python_tag|>",), ("<|start_header_id|>", '"parameters":')),
    ),
    # Reasoning and no calls that are known: QwQ, many distilled models.
    "think": KnownFormat({"fields": {"reasoning_content": _THINK, "content": _TEXT}}, None, (("</think>",),)),
    "plain": KnownFormat({"fields": {"content": {"content_args": {"strip": False}}}}, None, ()),
}
