"""Chat templates: from a conversation to the text that a model was trained to continue."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kvist.base.errors import ConfigError, KvistError, RequestError
from kvist.base.files import read_json
from kvist.text.reading import read_text
from kvist.text.template_process import BadTemplate, TemplateProcess
from kvist.text.template_traits import Traits, traits_of

NAMED_TEMPLATES = "additional_chat_templates"  # a folder
_MOST_SOURCE = 1 << 20  # characters of a template
_TAG = (
    "THE MODEL CONTINUES HERE "  # stands at the end of the message that is continued; the space shows what was trimmed
)
_REASONING = ("reasoning_content", "thinking", "reasoning")
_GIVEN = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatTemplate:
    """A checkpoint's chat template.

    `source` is its text (of the one for tools too, where there is one). `stops`: texts that end an answer.
    `wants_short_ids`: it takes identifiers of calls only if they have nine characters. May be used from any thread.
    """

    def __init__(
        self, templates: Mapping[str, str], tokens: Mapping[str, str], where: str, stops: tuple[str, ...] = ()
    ) -> None:
        """`templates`: "default", and perhaps "tool_use" for requests that have tools. `tokens`: what they may use by
        name, as `bos_token`. Raises `ConfigError` that names `where` for a template that does not compile."""
        if any(len(source) > _MOST_SOURCE for source in templates.values()):
            raise ConfigError(f"{where}: a chat template has at most {_MOST_SOURCE:,} characters")
        self._names = frozenset(templates)
        self._process = TemplateProcess(templates)
        try:
            self._process.compile()
        except BadTemplate as error:
            raise ConfigError(f"{where}: the chat template cannot be compiled: {error}") from None
        self._tokens = dict(tokens)
        self.source = "\n".join(templates.values())
        self.stops = stops
        self.wants_short_ids = re.search(r"id\s*\|\s*length\s*(?:!=|==)\s*9\b", self.source) is not None

    @classmethod
    def load(cls, directory: Path, override: Path | None = None) -> "ChatTemplate | None":
        """The template in `override`, a file or the name of one of the checkpoint's, else the checkpoint's own:
        chat_template.jinja with additional_chat_templates/, or `chat_template` in tokenizer_config.json. None when it
        has none. Its `stops` are `stop_strings` in
        generation_config.json. Raises `ConfigError`, and `TextError` for a file that cannot be read."""
        config = tokenizer_config(directory)
        tokens, stops = _tokens(directory, config), _stops(directory / "generation_config.json")
        if override is not None and override.name == str(override) and not override.is_file():
            named_file = directory / NAMED_TEMPLATES / f"{override}.jinja"
            override = named_file if named_file.is_file() else override
        path = override or directory / "chat_template.jinja"
        if override is not None or path.is_file():
            templates = {"default": read_text(path)}
            for_tools = directory / NAMED_TEMPLATES / "tool_use.jinja"
            if override is None and for_tools.is_file():
                templates["tool_use"] = read_text(for_tools)
            return cls(templates, tokens, str(path), stops)
        path = directory / "tokenizer_config.json"
        named = _named(config.get("chat_template"), path)
        return cls(named, tokens, str(path), stops) if named else None

    @cached_property
    def traits(self) -> Traits:
        """What it does with tools and calls, found by trying when it is first asked."""
        return traits_of(lambda messages, tools: self.render(messages, tools))

    @property
    def ready(self) -> bool:
        """Whether one can be rendered without waiting for a process."""
        return self._process.ready

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The prompt. `continue_final`: it ends with the last message's content, which the model continues; nothing
        then introduces an answer.

        Raises `RequestError` for what the template refuses, or what it cannot be run on.
        """
        if not messages:
            raise RequestError("a conversation needs at least one message")
        if taken := sorted(_GIVEN & variables.keys()):
            raise RequestError(
                f"a template variable cannot be called {taken[0]!r}; that is what the request itself holds"
            )
        try:
            conversation = [_message(message) for message in messages]
            final = _tag_final(conversation) if continue_final else ""
            given = {
                **self._tokens,
                **_plain(variables),
                "messages": conversation,
                "tools": _plain(tools) if tools else None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt and not continue_final,
            }
            text = self._written("tool_use" if tools and "tool_use" in self._names else "default", given)
        except RecursionError:
            raise RequestError("the messages are nested too deeply") from None
        return _cut(text, final) if continue_final else text

    def _written(self, name: str, variables: Mapping[str, Any]) -> str:
        rendered = self._process.render(name, variables)
        if rendered.text is not None:
            return rendered.text
        match rendered.kind:
            case "too much":
                raise RequestError(f"the chat template {rendered.message}")
            case "refused":
                raise RequestError(f"the chat template refuses these messages: {rendered.message}")
            case "nested":
                raise RequestError("the messages, or the chat template's calls, are nested too deeply")
        raise RequestError(f"the chat template fails on these messages: {rendered.message}")


def tokenizer_config(directory: Path) -> dict[str, Any]:
    """The JSON object in tokenizer_config.json; empty when there is no such file. Raises `ConfigError`."""
    return _optional(directory / "tokenizer_config.json")


def _optional(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except KvistError as error:
        raise ConfigError(str(error)) from error


def _tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that have a name, each a string there or an object with `content`."""
    tokens = {}
    for key, value in (_optional(directory / "special_tokens_map.json") | dict(config)).items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            tokens[key] = content
    return tokens


def _stops(path: Path) -> tuple[str, ...]:
    stops = _optional(path).get("stop_strings")
    listed = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if not all(isinstance(stop, str) and stop for stop in listed):
        raise ConfigError(f"{path}: stop_strings should be a text or a list of texts, got {stops!r:.80}")
    return tuple(listed)


def _named(templates: Any, path: Path) -> dict[str, str]:
    """`chat_template` as configurations write it: a text, or a list of objects with `name` and `template`."""
    if templates is None:
        return {}
    if isinstance(templates, str):
        return {"default": templates}
    try:
        named = {str(entry["name"]): entry["template"] for entry in templates}
    except (TypeError, KeyError):
        named = {}
    if "default" not in named or not all(isinstance(template, str) for template in named.values()):
        raise ConfigError(f"{path}: chat_template should be a text, or a list of named ones with a 'default'")
    return {name: named[name] for name in ("default", "tool_use") if name in named}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without what is None, but for the content beside calls, and with its reasoning under the names that
    templates look for."""
    kept = {"content"} if message.get("tool_calls") else set()
    copied = {key: value for key, value in _plain(message).items() if value is not None or key in kept}
    reasoning = next((copied[key] for key in _REASONING if key in copied), None)
    return copied if reasoning is None else {"thinking": reasoning, **copied, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A copy that consists of JSON's types: a template sees, and may change, nothing else."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise RequestError(f"a conversation consists of JSON values, which a {type(value).__name__} is not")


def _tag_final(conversation: list[dict[str, Any]]) -> str:
    """Mark where the last message's content ends, and return that content."""
    content = conversation[-1].get("content")
    if conversation[-1].get("role") != "assistant" or not isinstance(content, str):
        raise RequestError("only a last message of the assistant's with text for content can be continued")
    conversation[-1]["content"] = content + _TAG
    return content


def _cut(text: str, content: str) -> str:
    """The rendered text up to the mark. Where the template trimmed the message, so is what comes before."""
    mark = text.rfind(_TAG.strip())
    if mark < 0 or content.strip() not in text[:mark]:
        raise RequestError("the last message cannot be continued: the chat template leaves out part of its content")
    return text[:mark] if text.startswith(_TAG, mark) else text[:mark].rstrip()
