"""Texts: one, several together, as they come, and held to a form.

python examples/generate.py [MODEL]
"""

import sys

import kvist

# %% One text

llm = kvist.LLM(sys.argv[1] if len(sys.argv) > 1 else None, memory="256MiB")
answer = llm.generate("ROMEO:", kvist.Sampling(temperature=0.7, seed=1), max_tokens=80)
print(answer.text)
print(f"{answer.usage.new_tokens} tokens in {answer.timings.decode:.2f} s")

# %% Several, computed together; each is what it would be alone

for seed, answer in enumerate(
    llm.generate(["JULIET:"] * 4, [kvist.Sampling(temperature=1.0, seed=seed) for seed in range(4)], max_tokens=30)
):
    print(f"--- seed {seed}:{answer.text}")

# %% As it comes

for delta in llm.stream("NURSE:", max_tokens=60):
    print(delta.text, end="", flush=True)
print()

# %% Held to a form

print(llm.generate("ROMEO:", regex="(I|Thou) (love|hate) (thee|me)!").text)

llm.close()
