"""openvino-genai, measured from within: run by the python of an environment that has it.

Reads commands from stdin and writes answers to stdout, one JSON object a line. The first command names the folder of
the exported model and the setting; then `fill` sets the context, `decode` is measured behind it, `prefill` with prompts
that nothing is cached of."""

import json
import os
import random
import sys

import numpy as np

_ANSWERS = os.dup(1)  # the library writes to stdout, too
os.dup2(2, 1)

import openvino as ov  # noqa: E402
import openvino_genai as genai  # noqa: E402


class Pipeline:
    def __init__(self, model: str, kv: str, most: int, threads: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 4  # GB
        scheduler.max_num_batched_tokens = max(most + 64, 4096)
        scheduler.enable_prefix_caching = True
        # It keeps floating-point keys and values in the type in which it computes here, and refuses the other.
        bf16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        precision = {"float": "bf16" if bf16 else "f32"}.get(kv, kv)
        properties = {"KV_CACHE_PRECISION": precision, "INFERENCE_NUM_THREADS": threads}
        self.pipeline = genai.LLMPipeline(model, "CPU", scheduler_config=scheduler, **properties)
        self.length = 0
        self.random = random.Random(0)

    def run(self, tokens: list, new: int) -> "genai.PerfMetrics":
        ids = ov.Tensor(np.array([tokens], np.int64))
        inputs = genai.TokenizedInputs(ids, ov.Tensor(np.ones((1, len(tokens)), np.int64)))
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        return self.pipeline.generate(inputs, config).perf_metrics

    def context(self) -> list:
        return [5 + position % 1000 for position in range(max(self.length, 1))]

    def fill(self, length: int) -> None:
        self.length = length
        self.run(self.context(), 1)

    def decode(self, tokens: int) -> float:
        return self.run(self.context(), tokens + 1).get_tpot().mean / 1000

    def prefill(self, tokens: int) -> float:
        return self.run([self.random.randrange(5, 1000) for _ in range(tokens)], 1).get_ttft().mean / 1000


def main() -> None:
    def say(answer: dict) -> None:
        os.write(_ANSWERS, json.dumps(answer).encode() + b"\n")

    pipeline = Pipeline(**json.loads(sys.stdin.readline()))
    say({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        seconds = getattr(pipeline, command["do"])(command["tokens"])
        say({} if seconds is None else {"seconds": seconds})


if __name__ == "__main__":
    main()
