"""How likely a model finds texts, and which of several answers it would choose.

python examples/score.py [MODEL]
"""

import sys

import kvist

llm = kvist.LLM(sys.argv[1] if len(sys.argv) > 1 else None, memory="256MiB")

# %% Perplexity

for text in (
    "But soft, what light through yonder window breaks?",
    "But soft, what light through yonder widnow braeks?",
):
    print(f"{llm.score(text).perplexity:8.2f}  {text}")

# %% Choosing: the log-probability of each answer behind the question

question = "ROMEO:\nI love thee, "
for answer in ("Juliet", "Tybalt", "zxqj"):
    behind = llm.score(question + answer)
    length = len(llm.tokenize(question))
    print(f"{sum(behind.logprobs[length - 1 :]):8.2f}  {answer}")

# %% Where a text surprises the model: its least likely letters

text = "The king is dead; long live the fish!"
score = llm.score(text)
worst = sorted(range(len(score.logprobs)), key=score.logprobs.__getitem__)[:3]
for place in sorted(worst):
    before, here = llm.detokenize(score.tokens[: place + 1]), llm.detokenize(score.tokens[place + 1 : place + 2])
    print(f"{score.logprobs[place]:8.2f}  {before}|{here}")

llm.close()
