"""Find a text, turn it into ids, split it, and keep the result in the cache; and download enwik8.

Whole enwik8 is split 90M / 5M / 5M bytes as in the published work, every other text in the same proportions. The split
is by bytes of the source; what the vocabulary drops is dropped afterwards. A prepared corpus is one folder named by
its content (ids.bin, meta.json), written aside, made durable and then renamed, so that ranks may prepare it at the same
time. The ids are compared with their checksum when they are opened for the first time, and again after any change of
the file. Batches are cut in engine/data/streams.py. This module never downloads unless asked: see download_enwik8.
"""

import hashlib
import http.client
import json
import platform
import shutil
import sysconfig
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.config import Corpus, CorpusConfig, Split, Tokens
from foreroute.engine.data.vocab import Vocab, build_vocab
from foreroute.engine.errors import UserError, require
from foreroute.engine.sealed_files import read_sealed, sealed, sha256_of, sync

ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"
ENWIK8_BYTES = 100_000_000
ENWIK8_SHA256 = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"

# Of a prepared corpus; part of its folder's name, so that another version makes its own.
_FORMAT = 2
_IDS, _META, _VERIFIED = "ids.bin", "meta.json", "verified.json"
_SPLITS = tuple(Split)  # in the order of the text
_NOT_STDLIB = {"test", "tests", "idlelib", "site-packages"}
_CHUNK = 1 << 20  # bytes read, hashed or counted at a time
_ARCHIVES = {  # by a mark and its place
    (b"\x1f\x8b", 0): "gzip",
    (b"PK\x03\x04", 0): "zip",
    (b"BZh", 0): "bzip2",
    (b"\xfd7zXZ\x00", 0): "xz",
    (b"\x28\xb5\x2f\xfd", 0): "zstd",
    (b"7z\xbc\xaf", 0): "7z",
    (b"ustar", 257): "tar",
}
_TIMEOUT_S = 30  # without a byte from the server


@dataclass(frozen=True, slots=True)
class PreparedCorpus:
    """A corpus as ids, split in three."""

    ids: NDArray[np.uint8]  # memory-mapped, the three splits one after the other
    vocab: Vocab
    sha256: str  # of the source text
    notes: list[str]  # lines that the user should see
    meta: dict[str, Any]  # what meta.json holds

    def split(self, split: Split) -> NDArray[np.uint8]:
        """Return the memory-mapped ids of a split."""
        first, end = self._bounds(split)
        return self.ids[first:end]

    def previous_id(self, split: Split) -> int:
        """Return the id just before a split in the corpus; 0 for train."""
        first, _ = self._bounds(split)
        return int(self.ids[first - 1]) if first else 0

    def _bounds(self, split: Split) -> tuple[int, int]:
        cuts = self.meta["cuts"]
        place = _SPLITS.index(split)
        return cuts[place], cuts[place + 1]


@dataclass(frozen=True, slots=True)
class _Source:
    text: bytes
    name: str  # for people
    asked: str  # the options that chose it, for error lines


def prepare(config: CorpusConfig, progress: Callable[[str], None] | None = None) -> PreparedCorpus:
    """Open the corpus from the cache, or make it there first; progress gets a line before slow work.

    Raises:
        UserError: no such file, not a usable text, a text too short for three splits, or a cache that cannot be used.
    """
    source = _read_source(config)
    sha256 = hashlib.sha256(source.text).hexdigest()
    _check_text(config, source, sha256)
    name = f"{config.name.name}-{config.tokens.name}-{sha256[:16]}-v{_FORMAT}"
    folder = Path(config.cache_dir) / "corpora" / name
    try:
        if not folder.is_dir():
            if progress is not None:
                progress(f"corpus {source.name}: preparing {len(source.text):,} bytes in {folder}")
            _write(folder, config, source, sha256)
        return _open(folder)
    except PermissionError as error:
        raise UserError(
            f"corpus.cache_dir={config.cache_dir}: {folder} cannot be read ({error.strerror}), it may belong to another"
            " user; take another corpus.cache_dir"
        ) from error


def enwik8_copy(config: CorpusConfig) -> Path:
    """Say where a downloaded enwik8 is kept."""
    return Path(config.cache_dir) / "downloads" / "enwik8"


def _read_source(config: CorpusConfig) -> _Source:
    if config.name is Corpus.stdlib:
        root = Path(sysconfig.get_paths()["stdlib"])
        text = b"".join(path.read_bytes() for path in _stdlib_files(root))
        return _Source(text, f"Python {platform.python_version()} standard library", "corpus=stdlib")
    if config.path:
        path, asked = Path(config.path), f"corpus.path={config.path}"
    else:  # only enwik8 needs none
        path, asked = enwik8_copy(config), "corpus=enwik8"
        require(
            path.exists(),
            f"corpus=enwik8: no local copy at {path}; run `python -m launch.prepare corpus=enwik8` or give "
            "corpus.path=FILE",
        )
    require(path.exists(), f"{asked}: no such file")
    require(path.is_file(), f"{asked}: not a file")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{asked}: cannot be read ({error.strerror})") from error
    for mark, kind in _ARCHIVES.items():
        require(not text.startswith(*mark), f"{asked}: is a {kind} archive, not text; unpack it first")
    return _Source(text, path.name, asked)


def _stdlib_files(root: Path) -> list[Path]:
    relative = [path.relative_to(root) for path in root.rglob("*.py") if path.is_file()]
    kept = [path for path in relative if not _NOT_STDLIB.intersection(path.parts)]
    return [root / path for path in sorted(kept, key=Path.as_posix)]


def _check_text(config: CorpusConfig, source: _Source, sha256: str) -> None:
    size = len(source.text)
    require(size > 0, f"{source.asked}: the text is empty")
    if config.name is Corpus.enwik8:
        genuine = size < ENWIK8_BYTES or sha256 == ENWIK8_SHA256
        require(
            genuine and source.text.startswith(b"<mediawiki "),
            f"{source.asked}: neither enwik8 nor a prefix of it ({size:,} bytes, SHA-256 {sha256}); use corpus=file",
        )


def _write(folder: Path, config: CorpusConfig, source: _Source, sha256: str) -> None:
    """Write a prepared corpus; if another process was faster, keep its folder."""
    text = source.text
    vocab = build_vocab(config.tokens, text)
    ids = vocab.encode(text)
    byte_cuts = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
    cuts = [cut - sum(text.count(value, 0, cut) for value in vocab.dropped) for cut in byte_cuts]
    for place, split in enumerate(_SPLITS):
        require(
            cuts[place] < cuts[place + 1],
            f"{source.asked}: {len(text):,} bytes are too short for three splits, the {split.name} split is empty",
        )
    require(vocab.size > 1, f"{source.asked}: has one symbol only; corpus.tokens=bytes takes it, with nothing to learn")
    meta = {
        "format": _FORMAT,
        "dtype": ids.dtype.name,
        "ids_sha256": hashlib.sha256(ids.data).hexdigest(),
        "source": source.name,
        "corpus": config.name.name,
        "tokens": config.tokens.name,
        "sha256": sha256,
        "bytes": len(text),
        "python": platform.python_version() if config.name is Corpus.stdlib else None,
        "symbols": list(vocab.symbols),  # byte value of each id
        "symbol_counts": _symbol_counts(ids, vocab.size),  # over the whole corpus
        "cuts": cuts,  # ids where the splits begin, and the end
        "byte_cuts": byte_cuts,
    }
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        aside.mkdir(parents=True)
        (aside / _IDS).write_bytes(ids.data)
        (aside / _META).write_text(json.dumps(sealed(meta)), encoding="ascii")
        for path in (aside / _IDS, aside / _META, aside):
            sync(path)
        aside.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise UserError(
                f"corpus.cache_dir={config.cache_dir}: {folder} cannot be written ({error.strerror})"
            ) from error
    finally:  # of a signal, too
        shutil.rmtree(aside, ignore_errors=True)


def _symbol_counts(ids: NDArray[np.uint8], vocab_size: int) -> list[int]:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(ids), _CHUNK):  # bincount makes int64 copies
        counts += np.bincount(ids[start : start + _CHUNK], minlength=vocab_size)
    return counts.tolist()


def _open(folder: Path) -> PreparedCorpus:
    try:
        for name in (_IDS, _META):
            (folder / name).open("rb").close()  # what may not be read is not called damaged
        ids_size = (folder / _IDS).stat().st_size
        meta = read_sealed(folder / _META, "prepared corpus", _FORMAT)
        whole = ids_size == meta["cuts"][-1] * np.dtype(meta["dtype"]).itemsize
        require(whole, f"{_IDS} has {ids_size:,} bytes")
        _verify(folder, meta["ids_sha256"])
        ids = np.memmap(folder / _IDS, dtype=meta["dtype"], mode="r")
        vocab = Vocab(Tokens[meta["tokens"]], bytes(meta["symbols"]))
    except PermissionError:
        raise
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: damaged ({error}); delete it and run again") from error
    return PreparedCorpus(ids, vocab, meta["sha256"], _notes(meta), meta)


def _verify(folder: Path, ids_sha256: str) -> None:
    """Compare the ids with their checksum, unless the file is as it was when that was last done.

    Raises:
        UserError: they differ.
    """
    ids, mark = folder / _IDS, folder / _VERIFIED
    now = ids.stat()
    seen = {
        "bytes": now.st_size,
        "modified_ns": now.st_mtime_ns,
        "changed_ns": now.st_ctime_ns,  # of another copy of the file it is another
        "sha256": ids_sha256,
    }
    with suppress(OSError, ValueError):
        if json.loads(mark.read_bytes()) == seen:
            return
    require(sha256_of(ids) == ids_sha256, f"the sha256 of {_IDS} is not the one in {_META}")
    new = mark.with_name(f".{mark.name}.{uuid.uuid4().hex}")
    with suppress(OSError):  # as in a cache that only another user may write
        new.write_text(json.dumps(seen), encoding="ascii")
        new.replace(mark)


def _notes(meta: dict[str, Any]) -> list[str]:
    if meta["sha256"] == ENWIK8_SHA256:
        return []
    sizes = " / ".join(f"{b - a:,}" for a, b in zip(meta["cuts"], meta["cuts"][1:], strict=False))
    note = f"corpus {meta['source']}: {meta['bytes']:,} bytes split 90/5/5 in proportion: {sizes} symbols"
    if meta["corpus"] == Corpus.enwik8.name:
        note += "; a prefix of enwik8 does not compare with published results"
    return [note]


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
    unzipped = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        found = _unzip(part, unzipped)
        if found != sha256:
            part.unlink()
            raise UserError(f"{url}: SHA-256 of the unzipped file is {found}, expected {sha256}; deleted")
        unzipped.rename(target)
        part.unlink()
    finally:
        unzipped.unlink(missing_ok=True)


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
