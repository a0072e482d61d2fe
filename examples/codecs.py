"""What compressing the cache does to a text of your own: the same text under several codecs, beside full precision.

python examples/codecs.py [MODEL] [TEXT_FILE]
"""

import sys
from pathlib import Path

import kvist

model = sys.argv[1] if len(sys.argv) > 1 else None
text = (
    Path(sys.argv[2]).read_text()
    if len(sys.argv) > 2
    else ("ROMEO:\nIf I profane with my unworthiest hand\nThis holy shrine, the gentle fine is this.\n" * 4)
)

# %% The model's predictions in full precision

with kvist.LLM(model, memory="256MiB") as llm:
    ids = llm.tokenize(text)[: min(llm.context, 1024)]
    exact = llm.logits(ids).log_softmax(-1)
    full = llm.cache.usage().block_bytes

# %% And under each codec: how far they are from these, and how many bytes it takes

print(f"{'codec':<10}{'times smaller':>14}{'KL divergence':>16}{'same top token':>16}")
for codec in ("int8", "turbo4", "turbo3", "turbo2"):
    with kvist.LLM(model, kv=codec, memory="256MiB") as llm:
        other = llm.logits(ids).log_softmax(-1)
        smaller = full / llm.cache.usage().block_bytes
    divergence = (exact.exp() * (exact - other)).sum(-1)[64:].mean()  # the first block is never coded
    same = (exact.argmax(-1) == other.argmax(-1))[64:].float().mean()
    print(f"{codec:<10}{smaller:>14.2f}{divergence:>16.5f}{same:>16.1%}")
