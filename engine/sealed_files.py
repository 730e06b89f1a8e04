"""Files that are whole and durable, or not there: checksums, and JSON that holds its own."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from foreroute.engine.errors import UserError, require


def read_sealed(file: Path, what: str, version: int) -> dict[str, Any]:
    """Read a JSON object that holds a checksum of the rest of itself, and its format version; gives it without the
    checksum.

    Raises:
        UserError: it is missing, damaged, of another format version or a link; names the file and says why.
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
    """Refuse a file that lies elsewhere."""
    require(not file.is_symlink(), f"{file}: is a link, and must lie in its folder itself")


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Give what read_sealed takes: the content as JSON has it, with its checksum."""
    plain = json.loads(json.dumps(content))
    return {**plain, "checksum": checksum(plain)}


def checksum(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest's content."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk; a file system that cannot sync folders (CIFS, some of FUSE) is
    trusted."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
