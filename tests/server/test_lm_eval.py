"""The evaluation harness, unmodified, scores through our completions route what the model itself says."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kvist.models.plain import PlainView
from kvist.service.loaded import open_model
from live import Live

HARNESS = shutil.which("lm_eval")

QUESTIONS = [
    {"question": "The cache keeps", "choices": [" keys and values", " nothing", " the whole text again"], "answer": 0},
    {"question": "A prefix that is shared is", "choices": [" computed once", " computed twice"], "answer": 0},
    {"question": "To be, or not to be, that is", "choices": [" a tree", " the question", " 42", " why"], "answer": 1},
    {"question": "Number:", "choices": [" one", " two", " three"], "answer": 2},
]
TASK = """\
task: kvist_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


def expected(directory: Path, question: str, choice: str) -> tuple[float, bool]:
    """The log-likelihood of a choice, and whether greedy decoding gives it: from one pass without a cache."""
    loaded = open_model(str(directory))
    tokenizer = loaded.tokenizer()
    whole, start = tokenizer.encode(question + choice), len(tokenizer.encode(question))
    with torch.inference_mode():
        views = [PlainView() for _ in range(loaded.config.layers)]
        hidden = loaded.model(torch.tensor(whole), torch.arange(len(whole)), views)
        logprobs = loaded.model.logits(hidden).double().log_softmax(-1)
    rows = logprobs[start - 1 : -1]
    answer = torch.tensor(whole[start:])
    return float(rows.gather(1, answer[:, None]).sum()), bool((rows.argmax(-1) == answer).all())


@pytest.mark.slow
@pytest.mark.skipif(HARNESS is None, reason="lm_eval is not installed: pip install -e '.[clients]'")
def test_the_harness_scores_what_the_model_says(live_server: Live, tiny_model: Path, tmp_path: Path) -> None:
    assert HARNESS is not None
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (tmp_path / "choices.yaml").write_text(TASK.format(data=tmp_path / "questions.jsonl"))
    model = (
        f"model=tiny,base_url={live_server.url}/v1/completions,tokenizer={tiny_model},tokenizer_backend=huggingface,"
        "num_concurrent=3,max_retries=1,max_length=2048"
    )
    command = [HARNESS, "--model", "local-completions", "--model_args", model, "--tasks", "kvist_choices"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    ended = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == len(QUESTIONS)
    for row in rows:
        for choice, ((score, greedy),) in zip(row["doc"]["choices"], row["resps"], strict=True):
            wanted, is_greedy = expected(tiny_model, row["doc"]["question"], choice)
            assert float(score) == pytest.approx(wanted, abs=1e-3)
            assert (str(greedy) == "True") == is_greedy
