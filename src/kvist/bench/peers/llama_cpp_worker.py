"""llama.cpp, measured from within: run by the python of an environment that has llama-cpp-python.

Reads commands from stdin and writes answers to stdout, one JSON object a line. The first command names the model file
and the setting; then `fill` lengthens the context, `decode` and `prefill` are measured there and taken back."""

import ctypes
import json
import sys
import time

import llama_cpp

TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}
CHUNK = 512  # tokens of a call; and of a context that are computed, which what is longer repeats


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


class Context:
    def __init__(self, model: str, flash: bool, keys: str, values: str, most: int, threads: int) -> None:
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_quiet, None)
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = most + 2 * CHUNK
        parameters.n_batch = parameters.n_ubatch = CHUNK
        parameters.n_threads = parameters.n_threads_batch = threads
        # The second sequence is where a copy of the context stands while it moves; both in the same buffer.
        parameters.n_seq_max, parameters.kv_unified = 2, True
        parameters.type_k, parameters.type_v = TYPES[keys], TYPES[values]
        parameters.flash_attn_type = int(flash)
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.model or not self.context:
            raise SystemExit("llama.cpp could not load the model in this setting")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.length = 0

    def run(self, count: int, position: int) -> float:
        """Seconds of one call of `count` tokens from `position` on."""
        batch = llama_cpp.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for index in range(count):
            batch.token[index], batch.pos[index] = 5 + (position + index) % 1000, position + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = int(index == count - 1)
        start = time.perf_counter()
        failed = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_synchronize(self.context)
        seconds = time.perf_counter() - start
        llama_cpp.llama_batch_free(batch)
        if failed:
            raise SystemExit(f"llama.cpp answers {failed} at {position} tokens")
        return seconds

    def cut(self) -> None:
        llama_cpp.llama_memory_seq_rm(self.memory, 0, self.length, -1)

    def fill(self, length: int) -> None:
        """The first `CHUNK` tokens are computed; copies of what is there then follow, their keys rotated to where
        they stand, as a shift of the context does. How long a step takes does not depend on the numbers."""
        if length and not self.length:
            self.length = min(CHUNK, length)
            self.run(self.length, 0)
        while self.length < length:
            self._repeat(min(self.length, length - self.length))
        # What is still to be rotated is, before the next call.
        self.run(1, self.length)
        self.cut()

    def _repeat(self, count: int) -> None:
        """Put the first `count` tokens behind the context once more."""
        llama_cpp.llama_memory_seq_cp(self.memory, 0, 1, 0, count)
        size = llama_cpp.llama_state_seq_get_size(self.context, 1)
        state = (ctypes.c_uint8 * size)()
        written = llama_cpp.llama_state_seq_get_data(self.context, state, size, 1)
        llama_cpp.llama_memory_seq_rm(self.memory, 1, -1, -1)
        if not written or not llama_cpp.llama_state_seq_set_data(self.context, state, written, 1):
            raise SystemExit(f"llama.cpp could not copy {count} tokens of its context")
        llama_cpp.llama_memory_seq_add(self.memory, 1, 0, -1, self.length)
        llama_cpp.llama_memory_seq_cp(self.memory, 1, 0, -1, -1)
        llama_cpp.llama_memory_seq_rm(self.memory, 1, -1, -1)
        self.length += count

    def decode(self, tokens: int) -> float:
        seconds = sum(self.run(1, self.length + index) for index in range(tokens))
        self.cut()
        return seconds / tokens

    def prefill(self, tokens: int) -> float:
        """A whole prompt behind nothing, in calls of 512."""
        seconds = 0.0
        for start in range(0, tokens, CHUNK):
            seconds += self.run(min(CHUNK, tokens - start), self.length + start)
        self.cut()
        return seconds


def main() -> None:
    first = json.loads(sys.stdin.readline())
    context = Context(**first)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = {}
        if command["do"] == "fill":
            context.fill(command["tokens"])
        else:
            answer["seconds"] = getattr(context, command["do"])(command["tokens"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
