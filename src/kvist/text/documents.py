"""Texts out of files: plain text, markdown and source as they are, PDFs page by page, folders file by file."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvist.base.errors import TextError, install
from kvist.base.units import format_bytes, plural
from kvist.text.reading import read_text

MOST_BYTES = 64 << 20  # of all files together
_TEXT = frozenset(
    ".c .cc .cfg .cpp .css .csv .go .h .hpp .html .ini .java .js .json .jsonl .jsx .kt .lua .md .markdown .php .py .rb "
    ".rs .rst .scala .sh .sql .swift .tex .toml .ts .tsv .tsx .txt .xml .yaml .yml".split()
)
_PDF = ".pdf"


@dataclass(frozen=True)
class Document:
    """The text of one file, and its name within what was asked for."""

    name: str
    text: str


@dataclass(frozen=True)
class Reading:
    """What was read. `skipped`: files of folders that hold no text which is known here."""

    documents: tuple[Document, ...]
    skipped: int

    def joined(self) -> str:
        """One text; of several documents, each under a line with its name."""
        if len(self.documents) == 1:
            return self.documents[0].text
        return "\n\n".join(f"===== {document.name} =====\n{document.text}" for document in self.documents)


def read_documents(paths: Sequence[Path]) -> Reading:
    """Read files, and folders with all below them, in order. Hidden files and symbolic links in folders are left out.

    Raises `TextError`, naming the file, for what cannot be read, has no text, or is too much.
    """
    documents, skipped, total = list[Document](), 0, 0
    for name, path in _files(paths):
        if path.suffix.lower() not in _TEXT | {_PDF} and path not in paths:
            skipped += 1
            continue
        total += path.stat().st_size
        if total > MOST_BYTES:
            raise TextError(f"the files come to more than {format_bytes(MOST_BYTES)}; name fewer")
        text = _read_pdf(path, MOST_BYTES) if path.suffix.lower() == _PDF else read_text(path)
        if text.strip():
            documents.append(Document(name, text))
        else:
            skipped += 1
    if not documents:
        left = f"; {plural(skipped, 'file')} left out" if skipped else ""
        raise TextError(f"there is no text in {', '.join(map(str, paths))}{left}")
    return Reading(tuple(documents), skipped)


def _files(paths: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise TextError(f"{path} does not exist")
            yield path.name, path
            continue
        for found in sorted(path.rglob("*")):
            below = found.relative_to(path)
            hidden = any(part.startswith(".") for part in below.parts)
            if (
                not hidden
                and not found.is_symlink()
                and found.is_file()
                and found.resolve().is_relative_to(path.resolve())
            ):
                yield str(below), found


def _read_pdf(path: Path, most: int) -> str:
    """The text of all pages, of no more than `most` characters: a small file may hold far more than it takes."""
    try:
        import pypdf
    except ImportError:
        raise TextError(f"{path} is a PDF, and pypdf is missing; {install('pdf')} brings it") from None
    locked = f"{path} is encrypted; save it without a password first"
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise TextError(locked)
        pages, length = list[str](), 0
        for page in reader.pages:
            pages.append(page.extract_text())
            length += len(pages[-1])
            if length > most:
                raise TextError(f"{path} holds more than {most:,} characters of text; a part of it will do")
        text = "\n\n".join(pages)
    except pypdf.errors.DependencyError:  # for how it is encrypted
        raise TextError(locked) from None
    except TextError:
        raise
    except Exception as error:  # whatever a damaged file makes the library raise
        raise TextError(
            f"{path} cannot be read as a PDF: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None
    if not text.strip():
        raise TextError(f"{path} has no text in it, perhaps only pictures of pages; run it through OCR first")
    return text
