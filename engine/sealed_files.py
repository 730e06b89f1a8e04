"""Files that are complete and durable, or absent: checksums, and JSON files that hold their own checksum."""

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foreroute.engine.errors import UserError, require


def read_sealed(file: Path, what: str, version: int) -> dict[str, Any]:
    """Read a JSON object with a checksum and a format version; return it without the checksum.

    Raises:
        UserError: the file is missing, damaged, a link, or of another format version; the message names file and cause.
    """
    refuse_link(file)
    try:
        found = json.loads(file.read_bytes())
        stored = found.pop("checksum")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: not a {what} ({type(error).__name__}: {error})") from None
    require(stored == checksum(found), f"{file}: its checksum does not match its content")
    require(found["format"] == version, f"{file}: format version {found['format']}, this program reads {version}")
    return dict(found)


def refuse_link(file: Path) -> None:
    """Raise UserError if a file is a link."""
    require(not file.is_symlink(), f"{file}: is a link: must be a file in its folder")


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content, converted as JSON converts it, with its checksum, for read_sealed."""
    plain = json.loads(json.dumps(content))
    return {**plain, "checksum": checksum(plain)}


def checksum(plain: Any) -> str:
    """Return the sha256 of what JSON can write, such as a manifest, for any order of keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside a file, which replaces the file at the end of the block; after an error it is removed.

    Several processes may do this at once: each has a path of its own, and no reader sees a part of a file.
    """
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk; if the file system cannot sync folders (CIFS, some FUSE), return."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
