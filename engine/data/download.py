"""Download enwik8, once, and go on where a download was cut."""

import hashlib
import http.client
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from foreroute.engine.config import CorpusConfig
from foreroute.engine.errors import UserError
from foreroute.engine.sealed_files import replacing

ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"
ENWIK8_BYTES = 100_000_000
ENWIK8_SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"

_CHUNK = 1 << 20  # bytes
_TIMEOUT_S = 30  # without a byte from the server


def enwik8_copy(config: CorpusConfig) -> Path:
    """Return where a downloaded enwik8 is kept."""
    return Path(config.cache_dir) / "downloads" / "enwik8"


def download_enwik8(
    target: Path,
    url: str = ENWIK8_URL,
    *,
    sha256: str = ENWIK8_SHA256,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Download and unzip enwik8 to `target`, unless it is there; a cut download goes on where it stopped.

    Args:
        sha256: of the unzipped file; the default is the published digest of the whole 100,000,000 bytes.
        progress: gets (bytes so far, bytes in all or 0 if the server does not say) of the zip file.

    Raises:
        UserError: the network failed (what arrived is kept) or the content is wrong (it is deleted).
    """
    if target.is_file():
        return
    part = target.with_name(f"{target.name}.zip.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, progress or (lambda done, total: None))
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: download failed ({error}); run again to go on from {part}") from error
    with replacing(target) as unzipped:
        found = _unzip(part, unzipped)
        if found != sha256:
            part.unlink()
            raise UserError(f"{url}: SHA-256 of the unzipped file is {found}, expected {sha256}; deleted")
    part.unlink()


def _fetch(url: str, part: Path, progress: Callable[[int, int], None]) -> None:
    """Fetch what `part` lacks; raise OSError unless all of it has arrived."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is left to fetch; the digest tells whether that is so
        raise
    with response:
        if response.status != http.client.PARTIAL_CONTENT:
            done = 0  # a server without ranges sends everything
        length = response.headers["Content-Length"]
        total = done + int(length) if length else 0
        with part.open("ab" if done else "wb") as file:
            while block := response.read(_CHUNK):
                file.write(block)
                done += len(block)
                progress(done, total)
    if done < total:
        raise OSError(f"connection lost after {done:,} of {total:,} bytes")


def _unzip(part: Path, target: Path) -> str:
    """Unzip the archive's one file and return its SHA-256, or a word for an archive that is broken."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(part) as archive, archive.open(archive.namelist()[0]) as member, target.open("wb") as file:
            while block := member.read(_CHUNK):
                digest.update(block)
                file.write(block)
    except (zipfile.BadZipFile, zlib.error, IndexError, EOFError):
        return "unreadable"
    return digest.hexdigest()
