"""`kvist run`: text, JSON, seeds, stop strings, and what goes wrong."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import CONFIG, Kvist, Outcome

from kvist.weights.checkpoint import Checkpoint, save


def as_json(outcome: Outcome) -> dict:
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("\n") == 1
    return json.loads(outcome.out)


def test_json_counts_what_was_done(kvist: Kvist, model: Path) -> None:
    answer = as_json(kvist("run", model, "-p", "hello", "--max-tokens", 70, "--seed", 4, "--json"))
    assert answer["model"] == model.name
    assert answer["prompt_tokens"] == 5
    assert len(answer["tokens"]) == len(answer["text"]) == 70
    assert answer["finish_reason"] == "length"
    # Two layers, two KV heads of eight numbers, keys and values, four bytes each; 74 tokens fill two blocks.
    size = 2 * 64 * 256
    assert answer["kv"] == {
        "codec": "fp32",
        "blocks": 2,
        "bytes": size,
        "allocated_bytes": size,
        "bytes_per_token": 256.0,
    }
    assert set(answer["timings"]) == {"prefill_s", "decode_s", "prefill_tokens_per_s", "decode_tokens_per_s"}


def test_same_seed_same_text_another_seed_another(kvist: Kvist, model: Path) -> None:
    texts = [as_json(kvist("run", model, "-p", "a", "--seed", seed, "--json"))["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_streams_prompt_and_text_to_stdout_and_the_report_to_stderr(kvist: Kvist, model: Path) -> None:
    options = ("-p", "abc", "--max-tokens", 9, "--seed", 1)
    text = as_json(kvist("run", model, *options, "--json"))["text"]
    outcome = kvist("run", model, *options)
    assert outcome.out == f"abc{text}\n"
    assert outcome.err.count("\n") == 1
    assert "3 prompt tokens" in outcome.err
    assert "9 new" in outcome.err
    assert "KV fp32: 1 block, 16.0 KiB (256 B a token) · seed 1" in outcome.err


def test_greedy_is_temperature_zero(kvist: Kvist, model: Path) -> None:
    texts = {as_json(kvist("run", model, "-p", "a", "--temperature", 0, "--json"))["text"] for _ in range(2)}
    assert len(texts) == 1


def test_a_stop_string_ends_the_text_before_it(kvist: Kvist, model: Path) -> None:
    options = ("run", model, "-p", "abc", "--max-tokens", 60, "--seed", 3, "--json")
    whole = as_json(kvist(*options))["text"]
    stop = whole[20:23]
    answer = as_json(kvist(*options, "--stop", stop, "--stop", "0"))
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_the_context_ends_a_text(kvist: Kvist, model: Path) -> None:
    answer = as_json(kvist("run", model, "-p", "a" * 100, "--max-tokens", 1000, "--json"))
    assert answer["finish_reason"] == "length"
    assert len(answer["tokens"]) == 128 - 100 + 1


def test_an_end_of_text_token_ends_it(kvist: Kvist, model: Path) -> None:
    first = as_json(kvist("run", model, "-p", "abc", "--temperature", 0, "--json"))["tokens"]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": first[3]}))
    answer = as_json(kvist("run", model, "-p", "abc", "--temperature", 0, "--json"))
    assert answer["finish_reason"] == "stop"
    assert answer["tokens"] == first[: first.index(first[3]) + 1]
    assert len(answer["text"]) == len(answer["tokens"]) - 1


def test_sampling_is_the_models_where_nothing_is_said(kvist: Kvist, model: Path) -> None:
    greedy = as_json(kvist("run", model, "-p", "abc", "--temperature", 0, "--top-k", 5, "--json"))["tokens"]
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "top_k": 5}))
    assert as_json(kvist("run", model, "-p", "abc", "--json"))["tokens"] == greedy
    told = kvist("run", model, "-p", "abc", "--max-tokens", 4)
    assert "the model proposes temperature 0, top_k 5\n" in told.err
    warm = [as_json(kvist("run", model, "-p", "abc", "--temperature", 9, "--seed", n, "--json")) for n in range(3)]
    assert any(answer["tokens"] != greedy for answer in warm)


def refused(outcome: Outcome, *said: str) -> None:
    """Exit code 1, one line that says it all, nothing on stdout."""
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.startswith("kvist: ")
    assert outcome.err.count("\n") == 1
    for text in said:
        assert text in outcome.err


def test_prompts_that_cannot_run(kvist: Kvist, model: Path) -> None:
    refused(kvist("run", model, "-p", ""), "the prompt is empty")
    refused(kvist("run", model, "-p", "a" * 150), "prompt is too long: 150 tokens > 128 maximum")
    refused(kvist("run", model, "-p", "Ü"), "'Ü'", "27 characters")
    refused(kvist("run", model, "-p", "a", "--max-tokens", 0), "at least one new token", "got 0")
    refused(kvist("run", model, "-p", "a", "--temperature", -1), "temperature", "-1")
    refused(kvist("run", model, "-p", "a", "--top-p", 0), "top-p", "got 0")
    refused(kvist("run", model, "-p", "a", "--seed", -5), "seed", "-5")
    refused(kvist("run", model, "-p", "a", "--kv", "int3"), "'int3'", "fp32, bf16, fp16")
    refused(kvist("run", model, "-p", "a", "--dtype", "int3"), "'int3'", "fp32, bf16, fp16")
    refused(kvist("run", model, "--json"), "--json needs a prompt")


def test_models_that_cannot_be_found(kvist: Kvist, tmp_path: Path) -> None:
    refused(kvist("run", tmp_path / "nowhere", "-p", "a"), "no such directory", "nowhere")
    (tmp_path / "empty").mkdir()
    refused(kvist("run", tmp_path / "empty", "-p", "a"), "config.json does not exist")


def test_damaged_weights(kvist: Kvist, model: Path) -> None:
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused(kvist("run", model, "-p", "a"), "model.safetensors is truncated or corrupt")
    weights.unlink()
    refused(kvist("run", model, "-p", "a"), "holds neither model.safetensors nor")


def test_weights_that_do_not_fit(kvist: Kvist, model: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in Checkpoint(model).stream(Checkpoint(model).names())}
    name = "model.layers.1.self_attn.k_proj.weight"
    changes = {
        f"{name!r} is missing": {key: value for key, value in tensors.items() if key != name},
        "shape [3, 32], config.json says [16, 32]": tensors | {name: torch.zeros(3, 32)},
        "I64": tensors | {name: torch.zeros(16, 32, dtype=torch.int64)},
        "'model.layers.9.extra'": tensors | {"model.layers.9.extra": torch.zeros(3)},
    }
    for said, changed in changes.items():
        save(model / "model.safetensors", changed)
        refused(kvist("run", model, "-p", "a"), said)


def test_configs_that_are_not_understood(kvist: Kvist, model: Path) -> None:
    for said, change in {
        "architecture 'mamba'": {"model_type": "mamba"},
        "'attention_temperature'": {"attention_temperature": 2.0},
        "hidden_act='relu'": {"hidden_act": "relu"},
        "hidden_size should be of type int": {"hidden_size": "32"},
        "RoPE scaling 'longrope'": {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        "'vocab_size' is missing": {"vocab_size": None},
    }.items():
        (model / "config.json").write_text(json.dumps(CONFIG | change))
        refused(kvist("run", model, "-p", "a"), said, "config.json")
    (model / "config.json").write_text("{")
    refused(kvist("run", model, "-p", "a"), "not valid JSON")


def test_weights_that_are_not_numbers(kvist: Kvist, model: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in Checkpoint(model).stream(Checkpoint(model).names())}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save(model / "model.safetensors", tensors)
    outcome = kvist("run", model, "-p", "a")
    assert outcome.code == 1
    assert "logits are not finite" in outcome.err
    assert "Traceback" not in outcome.err


def test_ctrl_c_ends_between_two_tokens_and_reports(model: Path) -> None:
    config = CONFIG | {"max_position_embeddings": 100_000}
    (model / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "kvist", "run", str(model), "-p", "abc", "--max-tokens", "90000"]
    # Unbuffered: what a buffer of ours read ahead, `communicate` would not see.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        first = b""
        while len(first) < 20:
            first += process.stdout.read(20 - len(first))
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=300)
    streamed, rest, err = first.decode(), out.decode(), told.decode()
    assert process.returncode == 130, err
    assert streamed.startswith("abc")
    assert err.count("\n") == 1
    new = int(err.split(" · ")[1].split()[0].replace(",", ""))
    assert new == len(streamed + rest) - len("abc\n")
    assert f"{-(-(3 + new - 1) // 64):,} block" in err


def test_a_reader_that_goes_away_is_no_error(model: Path) -> None:
    command = f"{sys.executable} -m kvist run {model} -p abc --max-tokens 120 | head -c 2"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "ab"
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    code = """
import sys
from kvist.cli import main
try:
    main()
except SystemExit:
    pass
assert "torch" not in sys.modules, "torch was imported"
"""
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "kvist" in ended.stdout.lower() or "continue a prompt" in ended.stdout.lower()


def test_a_context_opens_the_model_that_made_it(kvist: Kvist, model: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the cat sat on the mat and looked at the moon " * 2)
    kept = ("--cache-dir", tmp_path / "kept")
    made = kvist("context", "create", "book", tmp_path / "book.txt", "--model", model, "--kv", "bf16", *kept)
    assert made.code == 0, made.err
    asked = ("--context", "book", *kept, "-p", " so", "--max-tokens", 4, "--temperature", 0, "--json")
    named = as_json(kvist("run", model, "--kv", "bf16", *asked))
    found = as_json(kvist("run", *asked))
    assert (found["model"], found["kv"]["codec"]) == (model.name, "bf16")
    assert (found["tokens"], found["cached"]) == (named["tokens"], named["cached"])
    assert sum(found["cached"].values()) >= 64
    # Whoever names a model, or how it is opened, means that.
    refused(kvist("run", model, *asked), "'book'", "another", "kv")
    refused(kvist("run", "--kv", "bf16", *asked), "'book'", "another", "weights")
