"""Texts out of files and folders."""

from pathlib import Path

import pytest

from kvist.base.errors import TextError
from kvist.text.documents import read_documents


def pdf(text: str) -> bytes:
    """A PDF of one page with one line of text."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode() if text else b""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 6\n0000000000 65535 f \n" + table
    return data + head + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(data)


def test_one_file_is_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Title\n\nText.\n")
    reading = read_documents([tmp_path / "a.md"])
    assert reading.joined() == "# Title\n\nText.\n"
    assert reading.skipped == 0


def test_a_folder_is_read_in_order_and_what_is_no_text_is_counted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.pdf").write_bytes(pdf("first"))
    (tmp_path / "sub" / "c.py").write_text("third = 3")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / ".hidden" / "x.txt").write_text("not read")
    (tmp_path / "link.txt").symlink_to("/etc/hostname")
    reading = read_documents([tmp_path])
    assert [(d.name, d.text.strip()) for d in reading.documents] == [
        ("a.pdf", "first"),
        ("b.txt", "second"),
        ("sub/c.py", "third = 3"),
    ]
    assert reading.skipped == 2
    assert reading.joined().startswith("===== a.pdf =====\nfirst")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("no.pdf", b"not a PDF at all", "cannot be read as a PDF"),
        ("cut.pdf", pdf("words")[:200], "cannot be read as a PDF|no text in it"),
        ("pictures.pdf", pdf(""), "no text in it, perhaps only pictures"),
        ("empty.txt", b"", "there is no text in"),
        ("bad.txt", b"\xff\xfe\x00x", "UTF-8"),
    ],
)
def test_what_cannot_be_read_says_why(name: str, data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TextError, match=said):
        read_documents([tmp_path / name])


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"nothing\.txt does not exist"):
        read_documents([tmp_path / "nothing.txt"])
