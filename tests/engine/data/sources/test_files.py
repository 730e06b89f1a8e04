"""Files by path, folder, pattern and list; unpacked by Python's own modules and the library's one-call functions."""

import gzip

import pytest
import zstandard

from foreroute.engine.data.sources import files
from foreroute.engine.data.sources.files import SourceFile, find_files, read_blocks
from foreroute.engine.errors import UserError

TEXT = b"".join(b"line %d\n" % i for i in range(300_000))


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a/z.txt", ".hidden", ".git/config", "a/.x", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def named(asked, option="corpus.path"):
    return [file.path for file in find_files(asked, option)]


def test_a_folder_a_pattern_and_a_list(folder):
    assert named(str(folder)) == [folder / "a/z.txt", folder / "b.txt", folder / "c.jsonl"]
    assert named(str(folder / "**/*.txt")) == [folder / "a/z.txt", folder / "b.txt"]
    assert named([str(folder / "c.jsonl"), str(folder / "a")]) == [folder / "c.jsonl", folder / "a/z.txt"]
    (folder / "d[1].txt").write_text("")  # a name that looks like a pattern
    assert named(str(folder / "d[1].txt")) == [folder / "d[1].txt"]


def test_error_lines_name_the_file_and_its_option(folder):
    assert find_files(str(folder / "b.txt"), "corpus.path")[0].label == f"corpus.path={folder / 'b.txt'}"
    assert find_files(str(folder), "corpus.path")[0].label == f"corpus.path: {folder / 'a/z.txt'}"
    for asked, words in (("nowhere", "nowhere: no such file"), (str(folder / "*.md"), "no file matches")):
        with pytest.raises(UserError, match=f"^corpus.valid_path=.*{words}"):
            find_files([str(folder), asked], "corpus.valid_path")


def read(path):
    return b"".join(read_blocks(SourceFile(path, "corpus.path=x")))


@pytest.mark.parametrize(
    "content",
    [
        TEXT,
        gzip.compress(TEXT[:999]) + gzip.compress(TEXT[999:]),
        zstandard.compress(TEXT[:999]) + zstandard.compress(b"") + zstandard.compress(TEXT[999:], 19),
    ],
    ids=["plain", "two members of gzip", "three frames of zstd"],
)
def test_blocks_are_the_unpacked_text(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    assert read(tmp_path / "x") == TEXT
    longest = max(map(len, read_blocks(SourceFile(tmp_path / "x", ""))))
    assert longest < len(TEXT)  # not all at once


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(TEXT)
    blocks = read_blocks(SourceFile(path, "corpus.path=x"))
    next(blocks)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"^corpus.path=x: has changed while it was read; run again$"):
        list(blocks)
    monkeypatch.setattr(files, "state_of", lambda path: [])  # control
    assert read(path) == TEXT + b"more"
