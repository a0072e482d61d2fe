"""The library gives what the command line and the server give, to the bit, and says where it came from."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import kvist
from kvist.runtime.request import Request
from kvist.service.generation import Generation
from kvist.service.loaded import open_model

PROMPTS = ["A twig is the part", "of a branch that grows in one season", "so is a cache", "A twig is the part"]
DRAWN = [kvist.Sampling(temperature=1.0, seed=seed) for seed in range(4)]
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 3, 7]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


def alone(model: str, prompt: str, sampling: kvist.Sampling, tokens: int) -> list[int]:
    """What `kvist run` draws: on an engine of its own."""
    loaded = open_model(model)
    tokenizer = loaded.tokenizer()
    request = Request(tuple(tokenizer.encode(prompt)), tokens, sampling, tokenizer.eos_ids)
    generation = Generation(loaded.engine(loaded.room(1000)), tokenizer, request)
    list(generation)
    return generation.result().tokens


# ---- texts


def test_a_batch_is_answered_as_each_alone(llm: kvist.LLM, tiny: str) -> None:
    together = llm.generate(PROMPTS, DRAWN, max_tokens=30)
    assert [list(answer.tokens) for answer in together] == [
        alone(tiny, prompt, sampling, 30) for prompt, sampling in zip(PROMPTS, DRAWN, strict=True)
    ]
    for prompt, sampling, answer in zip(PROMPTS, DRAWN, together, strict=True):
        one = llm.generate(prompt, sampling, max_tokens=30)
        assert (one.tokens, one.text, one.finish_reason) == (answer.tokens, answer.text, answer.finish_reason)


def test_texts_ids_and_conversations_are_prompts(llm: kvist.LLM) -> None:
    ids = llm.tokenize(PROMPTS[0])
    assert llm.generate(ids, max_tokens=9).tokens == llm.generate(PROMPTS[0], max_tokens=9).tokens
    mixed = llm.generate([ids, PROMPTS[0], HELLO], max_tokens=9)
    assert mixed[0].tokens == mixed[1].tokens
    assert mixed[2].tokens == llm.generate(HELLO, max_tokens=9).tokens == llm.chat(HELLO, max_tokens=9).tokens
    assert llm.detokenize(ids) == PROMPTS[0]
    assert llm.generate([], max_tokens=3) == []


def test_a_stream_adds_up(llm: kvist.LLM) -> None:
    whole = llm.generate(PROMPTS[1], DRAWN[1], max_tokens=40)
    deltas = list(llm.stream(PROMPTS[1], DRAWN[1], max_tokens=40))
    assert len(deltas) > 5
    assert "".join(delta.text for delta in deltas) == whole.text
    assert tuple(token for delta in deltas for token in delta.tokens) == whole.tokens
    last = deltas[-1].completion
    assert last is not None
    assert (last.text, last.tokens) == (whole.text, whole.tokens)
    assert all(delta.completion is None for delta in deltas[:-1])


def test_whoever_stops_reading_a_stream_ends_it(llm: kvist.LLM) -> None:
    stream = llm.stream(PROMPTS[0], max_tokens=1500)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    until_idle(llm)
    llm.cache.check()


def test_an_answer_says_what_it_took(llm: kvist.LLM) -> None:
    text = "so is a cache " * 40
    first = llm.generate(text, max_tokens=5, logprobs=2)
    assert first.usage.prompt_tokens == len(llm.tokenize(text))
    assert first.usage.new_tokens == len(first.tokens) == 5
    assert first.finish_reason is kvist.FinishReason.LENGTH
    assert first.timings.prefill > 0
    assert first.timings.decode > 0
    assert first.logprobs is not None
    assert [len(entry.top) for entry in first.logprobs] == [2] * 5
    assert first.logprobs[0].logprob == first.logprobs[0].top[0][1], "greedy draws the likeliest"
    again = llm.generate(text, max_tokens=5)
    assert again.tokens == first.tokens
    assert again.logprobs is None
    assert again.usage.cached["memory"] == first.usage.prompt_tokens - 1, "all but the token whose logits are wanted"
    assert again.usage.computed == 1
    found = llm.cache.explain()
    assert found is not None
    assert found.cached == {"memory": first.usage.prompt_tokens - 1}
    stopped = llm.generate(text, max_tokens=50, stop=["e"])
    assert "e" not in stopped.text


def test_grammars_hold(llm: kvist.LLM) -> None:
    schema = WEATHER["function"]["parameters"]  # type: ignore[index]
    answer = llm.generate(PROMPTS[0], DRAWN[0], schema=schema, max_tokens=200)
    jsonschema.validate(json.loads(answer.text), schema)
    assert llm.generate(PROMPTS[0], DRAWN[0], regex="(yes|no) [0-9]{3}").text[-4:].strip().isdigit()
    with pytest.raises(kvist.RequestError, match="not both"):
        llm.generate(PROMPTS[0], schema={}, regex="a")


# ---- conversations


def test_calls_come_as_values_and_go_back(llm: kvist.LLM) -> None:
    answer = llm.chat(HELLO, DRAWN[2], tools=[WEATHER], tool_choice="weather", max_tokens=200)
    (call, *_) = answer.tool_calls
    assert call.name == "weather"
    jsonschema.validate(call.arguments, WEATHER["function"]["parameters"])  # type: ignore[index]
    messages: list[Any] = [*HELLO, answer.message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    after = llm.chat(messages, tools=[WEATHER], tool_choice="none", max_tokens=5)
    assert after.usage.cached["memory"] > 60, "the conversation goes on where it ended"
    deltas = list(llm.stream_chat(HELLO, DRAWN[2], tools=[WEATHER], tool_choice="weather", max_tokens=200))
    assert deltas[-1].answer is not None
    assert [(one.name, one.arguments) for one in deltas[-1].answer.tool_calls] == [
        (one.name, one.arguments) for one in answer.tool_calls
    ]


def test_an_answer_may_be_json(llm: kvist.LLM) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    answer = llm.chat(HELLO, DRAWN[3], schema=schema)
    assert isinstance(answer.json["ok"], bool), answer


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tools": [{"name": 3}]}, "a tool has a name and parameters"),
        ({"tools": [WEATHER], "tool_choice": "other"}, "tool_choice is auto, none, required or the name of a tool"),
        ({"stop": "x"}, "stop is a list"),
        ({"adapter": "poems"}, "there is no adapter 'poems'; those that were opened: none"),
    ],
)
def test_what_cannot_be_asked_is_told(llm: kvist.LLM, given: dict[str, Any], said: str) -> None:
    with pytest.raises(kvist.RequestError, match=said):
        llm.chat(HELLO, **given)


# ---- numbers


def test_scores_logits_and_embeddings_agree_with_the_model(llm: kvist.LLM, tiny: str) -> None:
    ids = llm.tokenize(" ".join(PROMPTS) * 8)
    assert len(ids) > 200
    logits = llm.logits(ids)
    assert logits.shape == (len(ids), open_model(tiny).config.vocab_size)
    expected = logits.double().log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    score = llm.score(ids)
    assert score.tokens == tuple(ids)
    assert score.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    assert score.total == pytest.approx(expected.sum().item(), abs=1e-2)
    assert score.perplexity == pytest.approx(math.exp(-expected.mean().item()), rel=1e-4)
    text = " ".join(PROMPTS)
    assert llm.score(text).tokens == tuple(llm.tokenize(text))
    # The likeliest next token is the one that greedy sampling draws.
    assert llm.generate(ids, max_tokens=1).tokens == (int(logits[-1].argmax()),)
    assert torch.equal(logits, llm.logits(ids)), "computed anew, and to the same bits"
    vectors = llm.embed(PROMPTS)
    assert vectors.shape == (4, 32)
    assert vectors.norm(dim=-1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert torch.equal(vectors[0], vectors[3])
    assert torch.equal(llm.embed(PROMPTS[1]), vectors[1])


# ---- the cache


def test_the_cache_is_plain_values() -> None:
    with kvist.LLM(memory="16MiB", kv="turbo4") as llm:
        text = "so is a cache " * 40
        answer = llm.generate(text, max_tokens=5)
        length = answer.usage.prompt_tokens + 4  # the last token drawn is not computed
        usage = llm.cache.usage()
        assert usage.kv == "turbo4"
        assert usage.used == usage.idle == -(-length // 64)
        assert usage.by_codec["turbo4"] == usage.used * usage.block_bytes
        assert usage.by_tenant == {"": usage.used * usage.block_bytes}
        assert usage.open_used == 1, "the last block stays open"
        assert usage.by_tier["memory"] == sum(usage.by_codec.values())
        assert "turbo4" in usage._repr_html_()
        ((name, (node,)),) = llm.cache.prefixes().items()
        assert name == ""
        assert node.blocks == usage.used
        held: list[int] = []
        while True:
            assert node.idle
            held += node.tokens
            if not node.children:
                break
            (node,) = node.children
        assert held == [*llm.tokenize(text), *answer.tokens[:4]]


def test_what_is_computed_is_kept_beyond_the_process(tiny: str, tmp_path: Path) -> None:
    text = "so is a cache " * 40
    kept = {"cache_disk": "100MB", "cache_dir": str(tmp_path / "kv")}
    with kvist.LLM(tiny, memory="8MiB", **kept) as llm:  # type: ignore[arg-type]
        first = llm.generate(text, max_tokens=5)
        assert first.usage.cached == {}
    with kvist.LLM(tiny, memory="8MiB", **kept) as llm:  # type: ignore[arg-type]
        again = llm.generate(text, max_tokens=5)
        assert again.tokens == first.tokens
        assert again.usage.cached == {"disk": (first.usage.prompt_tokens - 1) // 64 * 64}
        assert llm.cache.usage().by_tier["disk"] > 0


def test_prompts_begin_with_a_kept_context(tiny: str, tmp_path: Path) -> None:
    text = "so is a cache " * 40
    kept = {"cache_disk": "100MB", "cache_dir": str(tmp_path / "kv"), "memory": "8MiB"}
    with kvist.LLM(tiny, **kept) as llm:  # type: ignore[arg-type]
        llm.contexts.make("handbook", text)
        llm.contexts.make("manners", text, chat=True)
        assert [one["name"] for one in llm.contexts.list()] == ["handbook", "manners"]
        plain = llm.generate([*llm.tokenize(text), *llm.tokenize(PROMPTS[0])], max_tokens=9)
    with kvist.LLM(tiny, **kept) as llm:  # type: ignore[arg-type]
        answer = llm.generate(PROMPTS[0], context="handbook", max_tokens=9)
        assert answer.tokens == plain.tokens, "as if the text stood there"
        assert answer.usage.prompt_tokens == plain.usage.prompt_tokens
        assert answer.usage.cached["disk"] >= 128
        told = llm.chat(HELLO, context="manners", max_tokens=9)
        assert told.usage.cached["disk"] >= 128
        assert told.tokens == llm.chat([{"role": "system", "content": text}, *HELLO], max_tokens=9).tokens
        assert "".join(delta.text for delta in llm.stream_chat(HELLO, context="manners", max_tokens=9)) == told.text
        with pytest.raises(kvist.RequestError, match="'manners' was made for conversations"):
            llm.generate(PROMPTS[0], context="manners")
        with pytest.raises(kvist.RequestError, match="'handbook' was made for texts"):
            llm.chat(HELLO, context="handbook")
        llm.contexts.remove("handbook")
        with pytest.raises(kvist.KvistError, match="handbook"):
            llm.generate(PROMPTS[0], context="handbook")
    with kvist.LLM(tiny, memory="8MiB") as llm, pytest.raises(kvist.RequestError, match="cache_disk"):
        llm.contexts.list()


# ---- what goes wrong


def until_idle(llm: kvist.LLM) -> None:
    end = time.monotonic() + 20
    while (load := llm._llm._open().load()).running or load.waiting:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_prompt_that_cannot_fit_ends_the_batch_and_nothing_else(llm: kvist.LLM) -> None:
    with pytest.raises(kvist.RequestError, match=r"prompt is too long: \d+ tokens > \d+ maximum"):
        llm.generate([PROMPTS[0], [1] * 5000], max_tokens=1000)
    until_idle(llm)
    llm.cache.check()
    with pytest.raises(kvist.RequestError, match="a prompt is a text, token ids or a list of messages, not a int"):
        llm.generate(3)  # type: ignore[call-overload]
    with pytest.raises(kvist.RequestError, match="there are 2 prompts and 4 samplings"):
        llm.generate(PROMPTS[:2], DRAWN)
    with pytest.raises(kvist.RequestError):
        llm.logits([10**6])
    assert llm.generate(PROMPTS[0], max_tokens=3).tokens


def test_ctrl_c_in_the_middle_of_a_batch_leaves_it_usable(llm: kvist.LLM) -> None:
    def interrupt() -> None:
        while not llm._llm._open().load().running:
            time.sleep(0.001)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([f"{number} is the part" for number in range(30)], max_tokens=1500)
    thread.join()
    until_idle(llm)
    llm.cache.check()
    assert llm.generate(PROMPTS[0], max_tokens=9).tokens == llm.generate(PROMPTS[0], max_tokens=9).tokens


def test_threads_may_ask_at_once(llm: kvist.LLM) -> None:
    expected = llm.generate(PROMPTS, DRAWN, max_tokens=20)
    found: list[Any] = [None] * 4

    def ask(number: int) -> None:
        found[number] = llm.generate(PROMPTS[number], DRAWN[number], max_tokens=20)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.tokens for one in found] == [one.tokens for one in expected]


def test_a_closed_one_says_so_and_leaves_no_thread(tiny: str) -> None:
    before = set(threading.enumerate())
    llm = kvist.LLM(tiny, memory="8MiB")
    streaming = llm.stream(PROMPTS[0], max_tokens=1500)
    next(streaming)
    llm.generate(HELLO, max_tokens=2)
    llm.close()
    llm.close()
    with pytest.raises(kvist.KvistError):
        list(streaming)
    for ask in (
        lambda: llm.generate("a"),
        lambda: llm.stream("a"),
        lambda: llm.chat(HELLO),
        lambda: llm.tokenize("a"),
        lambda: llm.cache.usage(),
    ):
        with pytest.raises(kvist.Closed, match="closed"):
            ask()
    end = time.monotonic() + 20
    while left := set(threading.enumerate()) - before:
        assert time.monotonic() < end, left
        time.sleep(0.01)


def test_memory_that_is_not_there_is_refused(tiny: str) -> None:
    before = threading.active_count()
    with pytest.raises(kvist.KvistError, match=r"a KV budget of .* is more than the"):
        kvist.LLM(tiny, memory="900TiB")
    with pytest.raises(kvist.KvistError, match="memory takes a size"):
        kvist.LLM(tiny, memory="much")
    with pytest.raises(kvist.KvistError, match="threads takes a number"):
        kvist.LLM(tiny, threads=10**6)
    with pytest.raises(kvist.KvistError, match="cache_disk says how much"):
        kvist.LLM(tiny, cache_dir="somewhere")
    assert threading.active_count() == before


FORK = """
import os, sys, kvist
llm = kvist.LLM(sys.argv[1], memory="8MiB", threads=1)
tokens = llm.generate("A twig", max_tokens=5).tokens
child = os.fork()
if not child:
    try:
        llm.generate("A twig")
    except kvist.Closed as error:
        print(error, flush=True)
    llm.close()
    os._exit(0)
os.waitpid(child, 0)
print(tokens == llm.generate("A twig", max_tokens=5).tokens)
llm.close()
"""


def test_after_a_fork_the_parent_has_it_and_the_child_is_told(tiny: str) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, tiny], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "this LLM belongs to the process that made it, and cannot be asked in this one; make another",
        "True",
    ]


# ---- on an event loop


def test_tasks_ask_at_once(llm: kvist.LLM, tiny: str) -> None:
    async def main() -> None:
        async with kvist.AsyncLLM(tiny, memory="8MiB") as other:
            pairs = zip(PROMPTS, DRAWN, strict=True)
            answers = await asyncio.gather(*(other.generate(prompt, one, max_tokens=20) for prompt, one in pairs))
            assert [a.tokens for a in answers] == [a.tokens for a in llm.generate(PROMPTS, DRAWN, max_tokens=20)]
            text = "".join([delta.text async for delta in other.stream(PROMPTS[0], DRAWN[0], max_tokens=20)])
            assert text == answers[0].text
            told = await other.chat(HELLO, DRAWN[1], max_tokens=20)
            assert told.text == llm.chat(HELLO, DRAWN[1], max_tokens=20).text
            assert torch.equal(await other.logits([1, 2, 3]), llm.logits([1, 2, 3]))
            assert (await other.score(PROMPTS[0])).logprobs == llm.score(PROMPTS[0]).logprobs
            asking = asyncio.create_task(other.generate(PROMPTS, max_tokens=1500))
            await asyncio.sleep(0.05)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            await other.cache.check()
        with pytest.raises(kvist.Closed):
            await other.generate("a")

    asyncio.run(main())


# ---- the package


def test_importing_it_is_quick_and_makes_the_settings() -> None:
    script = (
        "import sys, os, gc, kvist; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'], gc.get_threshold()[0])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["False", "10000", "50000"], done.stderr
    kept = {**environment, "GOMP_SPINCOUNT": "7"}
    done = subprocess.run(
        [sys.executable, "-c", f"import torch, gc; gc.set_threshold(9); {script}"],
        capture_output=True,
        text=True,
        env=kept,
    )
    assert done.stdout.split() == ["True", "7", "9"]
    assert done.stderr == "", "what somebody has chosen stays, and nothing is said"
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; {script}"], capture_output=True, text=True, env=environment
    )
    assert done.stderr.count("LateImport: torch was imported before kvist") == 1
    assert "import kvist first, or set GOMP_SPINCOUNT=10000" in done.stderr


def test_all_names_are_there() -> None:
    for name in kvist.__all__:
        assert getattr(kvist, name) is not None
        assert name in dir(kvist)
    with pytest.raises(AttributeError):
        kvist.Nothing  # noqa: B018
