"""Files of text as pieces of documents: plain text, or JSON lines with the text in one field.

A plain file is one document, as it is. Of JSON lines each line is one; a line break is put behind its text unless it
has one.
"""

import codecs
import json
from collections.abc import Iterable, Iterator

from foreroute.engine.data.sources.files import SourceFile, read_blocks
from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.errors import UserError, require

_JSON_LINES = (".jsonl", ".ndjson")
_PACKED = (".gz", ".zst", ".zstd")
_FIELD = "text"


def json_field(file: SourceFile, asked: str | None) -> str | None:
    """Return the field that holds a file's text; None for a plain file."""
    name = file.path.name.lower()
    for ending in _PACKED:
        name = name.removesuffix(ending)
    return asked or (_FIELD if name.endswith(_JSON_LINES) else None)


def read_plain(file: SourceFile, *, utf8: bool) -> Iterator[Piece]:
    """Yield a file in blocks, as one document.

    Args:
        utf8: refuse what is not UTF-8.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    for block in read_blocks(file):
        if utf8:
            _check_utf8(decoder, block, done, file)
        done += len(block)
        yield Piece(block, False)
    if utf8:
        _check_utf8(decoder, None, done, file)
    yield Piece(b"", True)


def _check_utf8(decoder: codecs.IncrementalDecoder, block: bytes | None, done: int, file: SourceFile) -> None:
    kept = len(decoder.getstate()[0])
    try:
        decoder.decode(block or b"", final=block is None)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.label}: byte {done - kept + error.start:,} is not UTF-8 text ({error.reason});"
            " corpus.tokens=bytes takes any file"
        ) from None


def read_json_lines(file: SourceFile, field: str) -> Iterator[Piece]:
    """Yield the text of each line as one document; empty lines are passed over.

    Raises:
        UserError: the file cannot be read, or a line is no JSON object with this field, or holds no text in it.
    """
    for number, line in enumerate(_lines(read_blocks(file)), 1):
        if line.strip():
            text = _text_of(line, field, f"{file.label}, line {number:,}")
            yield Piece(text if text.endswith(b"\n") else text + b"\n", True)


def _text_of(line: bytes, field: str, place: str) -> bytes:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from None
    require(isinstance(found, dict) and field in found, f"{place}: has no field {field!r} (corpus.field)")
    text = found[field]
    require(isinstance(text, str), f"{place}: field {field!r} holds {type(text).__name__}, not text")
    try:
        return bytes(text.encode())
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: field {field!r} is not Unicode text ({error.reason})") from None


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []  # of a line that is not whole yet
    for block in blocks:
        first, *rest = block.split(b"\n")
        parts.append(first)
        if rest:
            yield b"".join(parts)
            yield from rest[:-1]
            parts = rest[-1:]
    yield b"".join(parts)
