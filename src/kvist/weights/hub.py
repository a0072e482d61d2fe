"""From the name of a model to a directory: one that exists, or a download from the Hugging Face hub.

Where the hub is, where downloads are kept and who asks is huggingface_hub's to know (HF_ENDPOINT, HF_HOME,
HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN).
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvist.base.errors import ModelNotFound
from kvist.weights.parts import part_names

WANTED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
CONFIG = ("config.json",)
# The same weights once more, in other forms: subfolders (original/, onnx/) and Mistral's own naming.
UNWANTED = ("*/*", "consolidated*.safetensors")
ANSWER_SECONDS = 10.0

_HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_HUB_FILE = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?/(?P<file>([\w.-]+/){0,4}[\w.-]+\.gguf)"
)


def resolve(name: str, *, progress: bool, weights: bool = True) -> Path:
    """The directory of the model `name`: a path that exists, or a downloaded hub id, `org/name[@revision]`.

    `progress` shows bars on stderr where that is a terminal. Without `weights` only the config is fetched. Raises
    `ModelNotFound`, which says what was tried and what would work.
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        raise ModelNotFound(f"{name} is a file; a model is a directory with config.json and *.safetensors")
    match = _HUB_NAME.fullmatch(name)
    if match is None or name.startswith((".", "~")):
        raise ModelNotFound(f"no such directory: {name} (a model on the hub is named org/name or org/name@revision)")
    folder = _download(
        name, match["repository"], match["revision"], progress and sys.stderr.isatty(), WANTED if weights else CONFIG
    )
    if weights and not any(folder.glob("*.safetensors")):
        raise ModelNotFound(
            f"{name} holds no *.safetensors files; choose a repository with safetensors weights, or name one of its "
            f"GGUF files, as in {name}/FILE.gguf"
        )
    return folder


def resolve_file(name: str, *, progress: bool) -> Path | None:
    """A GGUF file on the hub, `org/name[@revision]/[FOLDER/]FILE.gguf`, downloaded, with the others where the model is
    split into several; None for a name of another form. Raises `ModelNotFound`."""
    match = _HUB_FILE.fullmatch(name)
    if match is None or name.startswith((".", "~")) or ".." in match["file"].split("/"):
        return None
    shown, repository = progress and sys.stderr.isatty(), match["repository"]
    wanted = part_names(match["file"])
    folder = _download(name, repository, match["revision"], shown, wanted, unwanted=())
    for file in (match["file"], *wanted):
        if not (folder / file).is_file():
            raise ModelNotFound(f"{repository} holds no {file}; choose one of its *.gguf files")
    return folder / match["file"]


def _download(
    name: str,
    repository: str,
    revision: str | None,
    progress: bool,
    files: Sequence[str],
    unwanted: Sequence[str] = UNWANTED,
) -> Path:
    from huggingface_hub import constants, errors  # here, for it takes a while to import

    tried = f"{name} is no directory here, and"
    try:
        with _progress_bars(progress):
            return _snapshot(repository, revision, files, unwanted)
    except errors.GatedRepoError as error:
        raise ModelNotFound(
            f"{name} is gated: accept its terms at {constants.ENDPOINT}/{repository} and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"{tried} {constants.ENDPOINT} has none of that name; check the spelling, or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(f"{repository} has no revision {revision!r} on {constants.ENDPOINT}") from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise ModelNotFound(
                f"{tried} it is not in {constants.HF_HUB_CACHE}; unset HF_HUB_OFFLINE to download it"
            ) from error
        raise _failed(tried, constants.ENDPOINT, error.__cause__ or error) from error
    except Exception as error:  # the errors of the HTTP client, which differs between versions of the library
        raise _failed(tried, constants.ENDPOINT, error) from error


def _snapshot(repository: str, revision: str | None, files: Sequence[str], unwanted: Sequence[str]) -> Path:
    """The cached snapshot of a repository, brought up to date where the hub answers.

    The library waits for its first answer without limit, so the hub is asked beforehand, with one.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    silence: Exception | None = None
    try:
        HfApi().model_info(repository, revision=revision, timeout=ANSWER_SECONDS)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception as error:  # no answer of use: what is in the cache will do
        silence = error
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(files),
            ignore_patterns=list(unwanted),
            local_files_only=silence is not None,
        )
    except errors.LocalEntryNotFoundError as error:
        raise error from silence
    return Path(folder)


def _failed(tried: str, endpoint: str, error: BaseException) -> ModelNotFound:
    lines = str(error).strip().splitlines()
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    return ModelNotFound(
        f"{tried} fetching it from {endpoint} failed ({reason}); check the network, or give a directory"
    )


@contextlib.contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Switches the hub's bars off inside, where they should not be shown and were not off already."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
