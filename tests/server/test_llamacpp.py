"""llama.cpp's own routes over a tiny model, and reranking."""

import json
from typing import Any

import httpx
import pytest


def ask(url: str, path: str, body: Any = None) -> httpx.Response:
    return httpx.request("GET" if body is None else "POST", f"{url}{path}", json=body, timeout=60)


def completion(url: str, **more: Any) -> dict[str, Any]:
    response = ask(url, "/completion", {"prompt": "Hello", "n_predict": 6, "temperature": 0, **more})
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_a_completion_is_what_openais_route_gives(server_url: str) -> None:
    body = {"prompt": "Hello", "max_tokens": 6, "temperature": 0, "logprobs": 2, "return_token_ids": True}
    expected = ask(server_url, "/v1/completions", body).json()["choices"][0]
    found = completion(server_url, n_probs=2, return_tokens=True, cache_prompt=False, id_slot=3)
    assert (found["content"], found["tokens"]) == (expected["text"], expected["token_ids"])
    assert (found["stop"], found["stop_type"], found["tokens_predicted"]) == (True, "limit", 6)
    probabilities = found["completion_probabilities"]
    assert [one["logprob"] for one in probabilities] == expected["logprobs"]["token_logprobs"]
    assert [one["id"] for one in probabilities] == found["tokens"]
    assert all(len(one["top_logprobs"]) == 2 for one in probabilities)
    for one in probabilities:  # greedy: what was drawn is the likeliest
        assert one["top_logprobs"][0] == {key: one[key] for key in ("id", "token", "bytes", "logprob")}
    settings = found["generation_settings"]
    assert (settings["temperature"], settings["n_predict"]) == (0, 6)
    assert found["timings"]["prompt_n"] + found["timings"]["cache_n"] == found["tokens_evaluated"]


def test_a_stream_has_its_own_shape(server_url: str) -> None:
    whole = completion(server_url)
    response = ask(server_url, "/completion", {"prompt": "Hello", "n_predict": 6, "temperature": 0, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, last = [json.loads(event.removeprefix("data: ")) for event in response.text.strip().split("\n\n")]
    assert "".join(piece["content"] for piece in pieces) == whole["content"]
    assert [piece["tokens_predicted"] for piece in pieces] == [1, 2, 3, 4, 5, 6]
    assert not any(piece["stop"] for piece in pieces)
    assert (last["stop"], last["content"], last["tokens_predicted"]) == (True, "", 6)


def test_prompts_of_texts_and_tokens(server_url: str) -> None:
    tokens = ask(server_url, "/tokenize", {"content": "Hello"}).json()["tokens"]
    whole = completion(server_url)
    assert completion(server_url, prompt=tokens)["content"] == whole["content"]
    assert completion(server_url, prompt=[tokens[0], *tokens[1:]])["prompt"] == "Hello"
    mixed = completion(server_url, prompt=["Hello", tokens[0], "x"])
    assert mixed["prompt"] == "HelloHx"
    assert mixed["tokens_evaluated"] == len(tokens) + 2


def test_grammars_schemas_stops_and_biases(server_url: str) -> None:
    assert completion(server_url, n_predict=20, grammar='root ::= "yes" | "no" | "may" "be"')["content"] in (
        "yes",
        "no",
        "maybe",
    )
    schema = {"type": "object", "properties": {"a": {"enum": [7]}}, "required": ["a"], "additionalProperties": False}
    assert json.loads(completion(server_url, n_predict=200, json_schema=schema)["content"]) == {"a": 7}
    text = completion(server_url, n_predict=12)["content"]
    stopped = completion(server_url, n_predict=12, stop=[text[3]])
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", text[3])
    assert stopped["content"] == text[: text.index(text[3])]
    (token,) = ask(server_url, "/tokenize", {"content": "x"}).json()["tokens"]
    assert completion(server_url, logit_bias=[["x", 100]])["content"] == "xxxxxx"
    first = completion(server_url, return_tokens=True)["tokens"][0]
    assert first not in completion(server_url, return_tokens=True, logit_bias=[[first, False]])["tokens"]
    assert token != first


def test_a_prompt_alone_is_computed_and_nothing_shown(server_url: str) -> None:
    prompt = "A prompt that nobody else has asked for, to the letter. "
    warm = completion(server_url, prompt=prompt, n_predict=0)
    assert (warm["content"], warm["tokens_predicted"], warm["tokens"]) == ("", 0, [])
    again = completion(server_url, prompt=prompt)
    assert again["timings"]["cache_n"] == again["tokens_evaluated"] - 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"mirostat": 1}, "mirostat"),
        ({"samplers": ["temperature"]}, "samplers"),
        ({"xtc_probability": 0.5}, "xtc_probability"),
        ({"grammar": "root"}, "cannot be read: Expected"),
        ({"grammar": "root ::= " + "(" * 5000}, "nested too deeply"),
        ({"grammar": "x" * 70_000}, "at most 8,192 characters"),
        ({"grammar": 'root ::= "a"', "json_schema": {}}, "one of them"),
        ({"lora": [{"id": 0, "scale": 1}]}, "lora"),
        ({"prompt": [999_999]}, "vocabulary"),
        ({"prompt": "Hm. " * 5000}, "> 2047 maximum"),
        ({"prompt": []}, "prompt"),
    ],
)
def test_refusals_are_one_line_in_llamacpps_shape(server_url: str, body: dict[str, Any], said: str) -> None:
    response = ask(server_url, "/completion", {"prompt": "a", "n_predict": 2, **body})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["type"]) == (400, "invalid_request_error")
    assert any(one in error["message"] for one in said.split("|")), error


def test_props_slots_and_templates(server_url: str) -> None:
    props = ask(server_url, "/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 2048
    assert (props["model_alias"], props["model_path"], props["total_slots"]) == ("tiny", "tiny", 4)
    assert props["eos_token"] == "<|im_end|>"
    slots = ask(server_url, "/slots").json()
    assert [slot["id"] for slot in slots] == [0, 1, 2, 3]
    assert not any(slot["is_processing"] for slot in slots)
    applied = ask(server_url, "/apply-template", {"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert applied == {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"}


def test_tokens_in_both_forms(server_url: str) -> None:
    tokens = ask(server_url, "/tokenize", {"content": "Hé"}).json()["tokens"]
    old = ask(server_url, "/tokenize", {"prompt": "Hé", "return_token_strs": True}).json()
    assert (old["tokens"], old["count"], old["max_model_len"]) == (tokens, len(tokens), 2048)
    pieces = ask(server_url, "/tokenize", {"content": "Hé", "with_pieces": True}).json()["tokens"]
    assert [one["id"] for one in pieces] == tokens
    raw = [one["piece"].encode() if isinstance(one["piece"], str) else bytes(one["piece"]) for one in pieces]
    assert b"".join(raw) == "Hé".encode()
    assert ask(server_url, "/detokenize", {"tokens": tokens}).json() == {"prompt": "Hé", "content": "Hé"}
    for wrong in ({}, {"prompt": "a", "content": "a"}):
        response = ask(server_url, "/tokenize", wrong)
        assert response.status_code == 400
        assert "prompt or as content" in response.text
    info = ask(server_url, "/tokenizer_info").json()
    assert (info["eos_token"], info["vocab_size"], info["tokenizer_class"]) == (
        "<|im_end|>",
        402,
        "PreTrainedTokenizerFast",
    )


def test_reranking_is_the_cosine_of_embeddings(server_url: str) -> None:
    documents = ["a tree", "the king of all", "a king"]
    data = ask(server_url, "/v1/embeddings", {"input": ["king", *documents]}).json()["data"]
    query, *vectors = [one["embedding"] for one in data]
    cosines = [sum(a * b for a, b in zip(query, vector, strict=True)) for vector in vectors]
    body = {"query": "king", "documents": documents, "return_documents": True}
    found = ask(server_url, "/v1/rerank", body).json()
    order = sorted(range(3), key=lambda index: -cosines[index])
    assert [one["index"] for one in found["results"]] == order
    assert [one["relevance_score"] for one in found["results"]] == pytest.approx([cosines[i] for i in order], abs=1e-6)
    assert [one["document"]["text"] for one in found["results"]] == [documents[i] for i in order]
    top = ask(server_url, "/rerank", {"query": "king", "documents": [{"text": one} for one in documents], "top_n": 1})
    assert [one["index"] for one in top.json()["results"]] == order[:1]
    assert "document" not in top.json()["results"][0]
    refused = ask(server_url, "/v2/rerank", {**body, "max_tokens_per_doc": 4})
    assert "max_tokens_per_doc is not supported" in refused.text
