"""transformers, measured from within: run by a python that has it.

Reads commands from stdin and writes answers to stdout, one JSON object a line. The first command names the folder of
the model; then `fill` lengthens the context, `decode` and `prefill` are measured there and taken back."""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache

CHUNK = 512


class Context:
    def __init__(self, model: str, most: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True).eval()
        self.cache = DynamicCache(config=self.model.config)
        self.length = 0

    @torch.inference_mode()
    def run(self, cache: DynamicCache, position: int, count: int) -> None:
        tokens = torch.tensor([[5 + (position + index) % 1000 for index in range(count)]])
        self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def fill(self, length: int) -> None:
        while self.length < length:
            count = min(CHUNK, length - self.length)
            self.run(self.cache, self.length, count)
            self.length += count

    def decode(self, tokens: int) -> float:
        start = time.perf_counter()
        for index in range(tokens):
            self.run(self.cache, self.length + index, 1)
        seconds = time.perf_counter() - start
        self.cache.crop(-tokens)  # so many of the last ones
        return seconds / tokens

    def prefill(self, tokens: int) -> float:
        cache, start = DynamicCache(config=self.model.config), time.perf_counter()
        for position in range(0, tokens, CHUNK):
            self.run(cache, position, min(CHUNK, tokens - position))
        return time.perf_counter() - start


def main() -> None:
    context = Context(**json.loads(sys.stdin.readline()))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        seconds = getattr(context, command["do"])(command["tokens"])
        print(json.dumps({} if seconds is None else {"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
