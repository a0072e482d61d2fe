"""A long document, read in parts by the model itself: it asks itself about each part, then about what it has found.

    python examples/recursive.py [MODEL] [TEXT_FILE]

Each part is read once: whatever is asked about it later begins with it, and finds it in the cache.
"""

import sys
from pathlib import Path

import kvist

PART = 600  # characters
LORDS = ("Oxford", "Surrey", "Norfolk", "Warwick", "Exeter", "Stanley")
SHIPS = "".join(
    f"{lord.upper()}:\nMy liege, the ship that {other} sent is lost at sea, and all her men.\n\n"
    for lord in LORDS
    for other in LORDS
)


def parts_of(text: str) -> list[str]:
    return [text[start : start + PART] for start in range(0, len(text), PART)]


def ask(llm: kvist.LLM, parts: list[str], question: str, tokens: int = 24) -> list[kvist.Completion]:
    """The same question of every part, all at once: the parts stand first, so that they are shared."""
    return llm.generate([f"{part}\n\n{question}" for part in parts], max_tokens=tokens)


def main(llm: kvist.LLM, text: str) -> None:
    parts = parts_of(text)
    computed, total = 0, 0
    for question in ("ROMEO:\nWho speaks here?", "ROMEO:\nWhat happens?", "ROMEO:\nHow does it end?"):
        answers = ask(llm, parts, question)
        notes = "\n".join(answer.text.strip() for answer in answers)
        # What was found is a text of its own, about which is asked in turn.
        (last,) = ask(llm, [notes[-PART:]], question)
        computed += sum(answer.usage.computed for answer in [*answers, last])
        total += sum(answer.usage.prompt_tokens for answer in [*answers, last])
        print(f"{question!r}: {last.text.strip()!r}")
    print(f"{total:,} prompt tokens asked, {computed:,} computed: each part was read once")


if __name__ == "__main__":
    given = Path(sys.argv[2]).read_text() if len(sys.argv) > 2 else SHIPS
    with kvist.LLM(sys.argv[1] if len(sys.argv) > 1 else None, memory="256MiB") as opened:
        main(opened, given)
