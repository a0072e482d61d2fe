"""`kvist convert`: other formats into ordinary checkpoint directories."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(help="A llama2.c .bin file, or a directory with one and its tokenizer.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The checkpoint directory to make; must not hold anything.")],
) -> None:
    """Turn a llama2.c checkpoint into a directory that `kvist run` and transformers load."""
    from kvist.weights.llama2c import convert as convert_llama2c

    convert_llama2c(source, out)
    typer.echo(f"wrote {out}; try: kvist run {out} -p 'Once upon a time'")
