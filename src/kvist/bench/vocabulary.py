"""A tokenizer for models with random weights, so that they can be served: of a given size, made without any text."""

from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvist.base.files import atomic_file
from kvist.text.training import save_tokenizer

BEGIN, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def synthetic_tokenizer(size: int) -> Tokenizer:
    """Byte-level BPE of exactly `size` tokens: the 256 bytes, letters put together to twos, threes, fours, and two
    special tokens. Every text can be encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(islice(_merges(), size - len(alphabet) - 2))
    tokens = [*alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BEGIN, END])
    return tokenizer


def write_tokenizer(directory: Path, size: int) -> None:
    """The tokenizer and a chat template, as files of a checkpoint."""
    save_tokenizer(synthetic_tokenizer(size), directory, eos=END)
    with atomic_file(directory / "chat_template.jinja") as temporary:
        temporary.write_text(TEMPLATE)


def _merges() -> Iterator[tuple[str, str]]:
    """Letters to twos, twos and letters to threes, twos to fours."""
    pairs = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    yield from product(ascii_lowercase, repeat=2)
    yield from product(pairs, ascii_lowercase)
    yield from product(pairs, repeat=2)
