"""Files of a corpus: found by a path, a folder, a pattern or a list of these, and read in blocks, unpacked meanwhile.

gzip and zstd are known by their first bytes, not by a name; other archives are refused. Nothing here holds more than
a block of a file.
"""

import glob
import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from foreroute.engine.errors import UserError, require

BLOCK = 1 << 20  # bytes read at a time
_PACKED_BLOCK = 1 << 16  # of zstd, whose text may be many times as long
_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` needs
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ARCHIVES = {  # by a mark and its place
    (b"PK\x03\x04", 0): "zip",
    (b"BZh", 0): "bzip2",
    (b"\xfd7zXZ\x00", 0): "xz",
    (b"7z\xbc\xaf", 0): "7z",
    (b"ustar", 257): "tar",
}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a corpus."""

    path: Path
    label: str  # names it in error lines, with the option that chose it


def find_files(asked: str | Sequence[str], option: str) -> list[SourceFile]:
    """Return the files that a path, a folder, a pattern or a list of these names, those of a folder in order of name.

    Of a folder all files are taken, at any depth, but those whose name, or whose folder's name, begins with a dot.

    Raises:
        UserError: something is not there, is no file, or has no files.
    """
    found: list[SourceFile] = []
    for path in [asked] if isinstance(asked, str) else asked:
        found += _named(path, f"{option}={path}", option)
    return found


def _named(asked: str, label: str, option: str) -> list[SourceFile]:
    path = Path(asked)
    if path.is_dir():
        inside = [file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path))]
        require(bool(inside), f"{label}: no files in this folder")
        return [SourceFile(file, f"{option}: {file}") for file in sorted(inside, key=Path.as_posix)]
    if not path.exists() and glob.has_magic(asked):
        matching = [Path(name) for name in sorted(glob.glob(asked, recursive=True)) if Path(name).is_file()]
        require(bool(matching), f"{label}: no file matches")
        return [SourceFile(file, f"{option}: {file}") for file in matching]
    require(path.exists(), f"{label}: no such file")
    require(path.is_file(), f"{label}: not a file")
    return [SourceFile(path, label)]


def _hidden(inside: Path) -> bool:
    return any(part.startswith(".") for part in inside.parts)


def state_of(path: Path) -> list[int]:
    """Return numbers that change when a file's content does, but for a file that somebody sets back on purpose."""
    now = path.stat()
    return [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino]


def is_packed(path: Path) -> bool:
    """Whether a file is gzip or zstd."""
    with path.open("rb") as raw:
        return raw.read(len(_ZSTD)).startswith((_GZIP, _ZSTD))


def read_blocks(file: SourceFile) -> Iterator[bytes]:
    """Yield the bytes of a file in blocks, unpacked where it is gzip or zstd.

    Raises:
        UserError: it cannot be read, is another archive, is broken, or changes meanwhile.
    """
    done = 0
    with reading(file), file.path.open("rb") as raw:
        try:
            for block in _unpacked(raw, file):
                done += len(block)
                yield block
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{file.label}: is damaged after {done:,} bytes of text ({error})") from error


@contextmanager
def reading(file: SourceFile) -> Iterator[None]:
    """Watch a file that is read in the block.

    Raises:
        UserError: it cannot be read, or has changed meanwhile.
    """
    try:
        before = state_of(file.path)
        yield
        require(state_of(file.path) == before, f"{file.label}: has changed while it was read; run again")
    except OSError as error:
        raise UserError(f"{file.label}: cannot be read ({error.strerror})") from error


def _unpacked(raw: BinaryIO, file: SourceFile) -> Iterator[bytes]:
    head = raw.read(512)
    raw.seek(0)
    for mark, kind in _ARCHIVES.items():
        require(not head.startswith(*mark), f"{file.label}: is a {kind} archive, not text; unpack it first")
    if head.startswith(_ZSTD):
        yield from _unpacked_zstd(raw)
        return
    stream: BinaryIO = gzip.GzipFile(fileobj=raw) if head.startswith(_GZIP) else raw  # type: ignore[assignment]
    while block := stream.read(BLOCK):
        yield block


def _unpacked_zstd(raw: BinaryIO) -> Iterator[bytes]:
    """Yield the text of all frames of a zstd file.

    Raises:
        EOFError: the last frame has no end, or a frame is broken.
    """
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame = None
    while block := raw.read(_PACKED_BLOCK):
        while block:
            frame = frame or unpacker.decompressobj()
            try:
                text = frame.decompress(block)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            if text:
                yield text
            block = b""
            if frame.eof:
                block, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the file ends in the middle of a zstd frame")
