import typer

app = typer.Typer()


def train() -> None: ...
