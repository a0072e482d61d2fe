"""Questions about documents that are read once: each is a context, kept on disk, and found there by the next process.

    python examples/rag.py [MODEL] [FILE ...]

Run it twice: the second time the documents are not computed at all.
"""

import re
import sys
from pathlib import Path

import kvist

PLAYS = {
    "verona": "PRINCE:\nRebellious subjects, enemies to peace, profaners of this neighbour-stained steel!\n" * 4,
    "denmark": "HORATIO:\nStay, illusion! If thou hast any sound, or use of voice, speak to me, ghost!\n" * 4,
    "rome": "ANTONY:\nFriends, Romans, countrymen, lend me your ears; I come to bury Caesar.\n" * 4,
}
QUESTION = "\nCITIZEN:\nWho are these that quarrel with the neighbour?\n\n"


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", text.lower()))


def best(documents: dict[str, str], question: str) -> str:
    """The document that shares the most words with the question. A search engine does this better."""
    return max(documents, key=lambda name: len(words(documents[name]) & words(question)))


def main(model: str | None, documents: dict[str, str], folder: str | None = None) -> None:
    with kvist.LLM(model, memory="256MiB", cache_disk="1GB", cache_dir=folder) as llm:
        made = {context["name"] for context in llm.contexts.list()}
        for name, text in documents.items():
            if name not in made:
                llm.contexts.make(name, text)
                print(f"read {name}")
        name = best(documents, QUESTION)
        answer = llm.generate(QUESTION, context=name, max_tokens=60)
        print(f"asked {name}: {answer.usage.computed} tokens computed, {dict(answer.usage.cached)} read")
        print(answer.text)


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[2:]]
    main(sys.argv[1] if len(sys.argv) > 1 else None, {file.stem: file.read_text() for file in files} or PLAYS)
