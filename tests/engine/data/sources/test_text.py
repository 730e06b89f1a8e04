import json

import pytest

from foreroute.engine.data.sources import files
from foreroute.engine.data.sources.files import SourceFile
from foreroute.engine.data.sources.text import json_field, read_json_lines, read_plain
from foreroute.engine.errors import UserError


def source(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    return SourceFile(path, "corpus.path=x")


def documents(pieces):
    """The documents that pieces make up."""
    found, part = [], b""
    for data, ends in pieces:
        part += data
        if ends:
            found.append(part)
            part = b""
    assert not part
    return found


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_json_lines_are_documents_with_a_line_break(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "BLOCK", block)
    texts = ["one", "", "two\nlines\n", "\u00e9\u4e2d", 'quote " and \\']
    lines = [json.dumps({"id": i, "body": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    content = "\n".join([*lines[:2], "", "  ", *lines[2:]]).encode()
    for end in (b"", b"\n", b"\r\n"):
        found = documents(read_json_lines(source(tmp_path, content + end), "body"))
        assert found == [text.encode() if text.endswith("\n") else text.encode() + b"\n" for text in texts]


@pytest.mark.parametrize(
    "line, words",
    [
        (b"{", "not JSON"),
        (b'{"text": "\xff"}', "not JSON .*utf-8"),
        (b"[1]", "has no field 'text'"),
        (b'{"other": 1}', "has no field 'text' .corpus.field."),
        (b'{"text": null}', "field 'text' holds NoneType, not text"),
        (b'{"text": "\\ud800"}', "field 'text' is not Unicode text"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, words):
    content = b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n'
    with pytest.raises(UserError, match=f"^corpus.path=x, line 3: {words}"):
        list(read_json_lines(source(tmp_path, content), "text"))


def test_which_files_are_json_lines():
    for name, asked, field in (
        ("a.jsonl", None, "text"),
        ("A.JSONL.zst", None, "text"),
        ("a.ndjson.gz", "body", "body"),
        ("a.json", None, None),
        ("a.txt", "body", "body"),
        ("jsonl", None, None),
    ):
        assert json_field(SourceFile(files.Path(name), ""), asked) == field


@pytest.mark.parametrize("block", [1, 2, 5, 1 << 20])
def test_the_first_byte_that_is_not_utf8_is_named(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "BLOCK", block)
    good = "a\u00e9\u4e2d\U0001f600\n".encode() * 3
    assert documents(read_plain(source(tmp_path, good), utf8=True)) == [good]
    for bad, place in ((good + b"\xff" + good, len(good)), (good + b"\xe4\xb8", len(good)), (b"a\xc3(", 1)):
        with pytest.raises(UserError, match=rf"^corpus.path=x: byte {place:,} is not UTF-8 text .*corpus.tokens=bytes"):
            list(read_plain(source(tmp_path, bad), utf8=True))
        assert documents(read_plain(source(tmp_path, bad), utf8=False)) == [bad]
