"""Through the real conversation layer: what a model is shown, and what becomes of a text that it might write."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic.types import Message
from fastapi import FastAPI
from scripted_chat import ASK, THINK, with_client

from kvist.runtime.request import FinishReason, TokenLogprobs
from kvist.server import anthropic as api
from kvist.server import errors
from kvist.server.settings import ServerSettings
from kvist.service.aside import Aside
from kvist.service.sampling import Proposed
from kvist.service.session import Delta, Job, NewToken
from kvist.text.chat import ChatTemplate
from kvist.text.response import FORMATS, ResponseFormat
from kvist.text.tokenizer import Tokenizer
from kvist.text.training import save_tokenizer, train_bytes_bpe
from tiny_model import EOS

TEMPLATE = r"""
{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}{% if message.name %} {{ message.name }}{% endif %}{{ '\n' }}
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""
LIST = {"name": "list_files", "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}}}
CALL = '<tool_call>\n{"name": "list_files", "arguments": {"path": "a b\\n\\u00fc"}}\n</tool_call>'


@dataclass
class Writer:
    """A session that writes a text, a few characters a token."""

    text: str
    width: int
    prompt_tokens: int
    cached_tokens: int = 0
    new_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    explanation = None

    def name(self, *ids: str) -> None:
        self.names = ids

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for start in range(0, len(self.text), self.width):
            self.new_tokens += 1
            yield Delta(0, self.text[start : start + self.width], (NewToken(0, None),))
        self.new_tokens += 1
        yield Delta(0, "", (NewToken(1, None),), FinishReason.STOP)

    def cancel(self) -> None:
        pass


@dataclass
class Serving:
    """A model that always writes the same."""

    tokenizer: Tokenizer
    template: ChatTemplate
    text: str
    width: int = 3
    name: str = "twig"
    strict_model: bool = False
    format: ResponseFormat = FORMATS["hermes"]
    grammars: None = None
    aside: Aside = field(default_factory=Aside)
    context: int = 4096
    adapters: dict[str, str] = field(default_factory=dict)
    proposed: Proposed = field(default_factory=Proposed)
    jobs: list[Job] = field(default_factory=list)

    def submit(self, job: Job) -> Writer:
        self.jobs.append(job)
        return Writer(self.text, self.width, len(job.request.prompt))

    @property
    def shown(self) -> str:
        """The prompt of the last request."""
        return self.tokenizer.decode(self.jobs[-1].request.prompt, skip_special=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    tokenizer = train_bytes_bpe("a tool that lists files " * 20, 300)
    tokenizer.add_special_tokens(["<|im_start|>", EOS])
    save_tokenizer(tokenizer, directory, eos=EOS)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def writing(model: Path, text: str, width: int = 3) -> Serving:
    template = ChatTemplate.load(model)
    assert template is not None
    return Serving(Tokenizer.load(model), template, text, width)


def answers(serving: Serving, **fields: Any) -> tuple[Message, Message]:
    """The answer whole, and put together from a stream."""
    app = FastAPI()
    app.include_router(api.router(serving, ServerSettings()))  # type: ignore[arg-type]
    errors.install(app)

    async def ask(client: anthropic.AsyncAnthropic) -> tuple[Message, Message]:
        body: dict[str, Any] = {**ASK, **fields}
        async with client.messages.stream(**body) as stream:
            streamed = await stream.get_final_message()
        return await client.messages.create(**body), streamed

    return with_client(app, ask)


def plain(message: Message) -> list[dict[str, Any]]:
    return [block.model_dump(exclude={"id"}, exclude_none=True) for block in message.content]


@pytest.mark.parametrize("width", [1, 2, 7, 1000])
def test_a_text_with_thinking_and_calls_is_taken_apart(model: Path, width: int) -> None:
    serving = writing(model, f"<think>\nHm.\n</think>\n\nI look.\n{CALL}", width)
    whole, streamed = answers(serving, tools=[LIST], thinking=THINK)
    assert plain(whole) == plain(streamed)
    thinking, text, call = plain(whole)
    assert thinking["type"] == "thinking"
    assert thinking["thinking"].strip() == "Hm."
    assert text["type"] == "text"
    assert text["text"].strip() == "I look."
    assert call == {"type": "tool_use", "name": "list_files", "input": {"path": "a b\n\u00fc"}}
    assert whole.stop_reason == streamed.stop_reason == "tool_use"


def test_without_tools_a_call_is_text(model: Path) -> None:
    whole, streamed = answers(writing(model, CALL))
    assert plain(whole) == plain(streamed)
    (text,) = plain(whole)
    assert text["type"] == "text"
    assert "list_files" in text["text"]
    assert whole.stop_reason == "end_turn"


def test_what_the_model_is_shown(model: Path) -> None:
    turns = [
        {"role": "user", "content": "Look."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "any"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "list_files", "input": {"path": "a"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "b c"}]},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    serving = writing(model, "Yes.")
    answers(serving, messages=turns, tools=[LIST], system="Be kind.", thinking={"type": "disabled"})
    declared = {"type": "function", "function": {"name": "list_files", "parameters": LIST["input_schema"]}}
    call = {"name": "list_files", "arguments": {"path": "a"}}
    assert serving.shown == (
        f"<tools>{json.dumps(declared)}</tools>\n"
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\nLook.<|im_end|>\n"
        f"<|im_start|>assistant\n<think>Hm.</think>I look.<tool_call>{json.dumps(call)}</tool_call><|im_end|>\n"
        "<|im_start|>tool list_files\nb c<|im_end|>\n"
        "<|im_start|>user\nWell?<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>"
    )


def test_a_prefill_ends_what_the_model_is_shown(model: Path) -> None:
    serving = writing(model, "B)")
    whole, _ = answers(serving, messages=[*ASK["messages"], {"role": "assistant", "content": "The answer is ("}])
    assert serving.shown.endswith("<|im_start|>assistant\nThe answer is (")
    assert plain(whole) == [{"type": "text", "text": "B)"}]


def test_counting_shows_the_same_prompt(model: Path) -> None:
    serving = writing(model, "Yes.")
    whole, _ = answers(serving, tools=[LIST], system="Be kind.")
    app = FastAPI()
    app.include_router(api.router(serving, ServerSettings()))  # type: ignore[arg-type]
    counted = with_client(
        app,
        lambda client: client.messages.count_tokens(
            model="any", messages=ASK["messages"], tools=[LIST], system="Be kind."
        ),
    )
    assert counted.input_tokens == whole.usage.input_tokens == len(serving.jobs[-1].request.prompt)


def test_stop_sequences_and_limits_reach_the_job(model: Path) -> None:
    serving = writing(model, "Yes.")
    answers(serving, stop_sequences=["\n\nHuman:"], max_tokens=7)
    job = serving.jobs[-1]
    assert job.stops == ("\n\nHuman:",)
    assert job.request.max_tokens == 7
    assert job.request.sampling.temperature == 1.0
