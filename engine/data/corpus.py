"""Open a corpus as ids: from the cache, or after it was prepared there (engine/data/preparation.py).

Whole enwik8 is split 90M / 5M / 5M bytes as in the published work, every other text in the same proportions. Of bytes
the split is exact, and by bytes of the source: what the vocabulary drops is dropped afterwards; other symbols are cut
where a document ends, or a line. A prepared corpus is one folder named by its content. The ids are compared with their
checksum when they are opened for the first time, and again after any change of the file. Batches are cut in
engine/data/streams.py. This module never downloads: see engine/data/download.py.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.config import Corpus, CorpusConfig, Split, Tokens
from foreroute.engine.data.documents import Starts, cached_ends
from foreroute.engine.data.download import ENWIK8_BYTES, ENWIK8_SHA256, enwik8_copy
from foreroute.engine.data.mixture import Mixture
from foreroute.engine.data.preparation import ENDS, FORMAT, IDS, META, SPLITS, Meter, content_sha256, write
from foreroute.engine.data.sources.files import read_blocks
from foreroute.engine.data.sources.source import Scan, Source, find_source, scan
from foreroute.engine.data.tokens.build import BYTES, open_vocab, tokenizer_file
from foreroute.engine.data.tokens.vocab import Ids, Vocab
from foreroute.engine.errors import UserError, require
from foreroute.engine.sealed_files import checksum, read_sealed, replacing, sha256_of

_VERIFIED = "verified.json"


@dataclass(frozen=True, slots=True)
class PreparedCorpus:
    """A corpus as ids, split in three."""

    ids: Ids  # memory-mapped, the three splits one after the other
    vocab: Vocab
    sha256: str  # of the source text
    notes: list[str]  # lines that the user should see
    meta: dict[str, Any]  # what meta.json holds
    document_ends: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Memory-mapped, ascending: the place in `ids` behind the last id of each document."""

    weights: tuple[int, ...] = ()
    """Of a mixture."""
    stretch: int = 1

    def split(self, split: Split) -> Ids:
        """Return the memory-mapped ids of a split; the training split of a mixture is read by its weights."""
        first, end = self._bounds(split)
        if self.weights and split is Split.train:
            return cast(Ids, Mixture(self.ids[first:end], self.meta["corpora"], self.weights, self.stretch))
        return self.ids[first:end]

    def document_starts(self, split: Split) -> Starts:
        """Return the positions in a split at which a document starts after another one, ascending; empty where none is
        known."""
        first, end = self._bounds(split)
        low, high = np.searchsorted(self.document_ends, (first, end))
        found: Starts = self.document_ends[low:high] - first if first else self.document_ends[low:high]
        text: Any = self.split(split)
        return text.document_starts(found) if isinstance(text, Mixture) else found

    def previous_id(self, split: Split) -> int:
        """Return the id just before a split in the corpus; 0 for train."""
        first, _ = self._bounds(split)
        return int(self.ids[first - 1]) if first else 0

    def bits_per_byte(self, split: Split, bits_per_symbol: float) -> float | None:
        """Return the bits per byte of the source, dropped bytes too; None where the source is ids.

        The code that they measure spells out what became the unknown symbol: 8 bits for each byte of it and for a byte
        that ends it.

        Example: 100 bytes are 20 symbols, three of them unknown words of 5 letters. At 6 bits per symbol that is
        (20 x 6 + 3 x 6 x 8) / 100 = 2.64 bits per byte.
        """
        if self.meta.get("unit") != "byte":
            return None
        first, end = self._bounds(split)
        place, symbols = SPLITS.index(split), end - first
        bytes_per_symbol = (self.meta["unit_cuts"][place + 1] - self.meta["unit_cuts"][place]) / symbols
        return float((bits_per_symbol + 8 * self.meta["spelled"][place] / symbols) / bytes_per_symbol)

    def _bounds(self, split: Split) -> tuple[int, int]:
        cuts = self.meta["cuts"]
        place = SPLITS.index(split)
        return cuts[place], cuts[place + 1]


def prepare(config: CorpusConfig, progress: Callable[[str], None] | None = None) -> PreparedCorpus:
    """Open the corpus from the cache, or make it there first; progress gets lines about slow work.

    Processes that want the same one at the same time make it once, and the others wait.

    Raises:
        UserError: no such file, not a usable text, a text too short for three splits, or a cache that cannot be used.
    """
    note = progress or (lambda line: None)
    source = find_source(config, enwik8_copy(config))
    cache = Path(config.cache_dir) / "sources"
    try:
        lock = cache / f"{source.signature()}.lock"
    except OSError as error:
        raise UserError(f"{source.asked}: cannot be read ({error.strerror})") from error
    with _held(lock, note):
        found = scan(source, cache, Meter(note, f"corpus {source.name}: reading", lambda: source.expected, source.unit))
        _check(source, found)
        folder = Path(config.cache_dir) / "corpora" / _name(source, found)
        try:
            if not folder.is_dir():
                note(f"corpus {source.name}: preparing {source.unit(sum(found.units))} in {folder}")
                write(folder, source, found, note)
            corpus = _with_ends(_open(folder), folder, config.document_end)
            if source.is_packed:
                line = f"corpus {source.name}: compressed (gzip or zstd), and unpacked as it is read"
                corpus = replace(corpus, notes=[*corpus.notes, line])
            return (
                corpus
                if config.weights is None
                else replace(corpus, weights=(*config.weights,), stretch=config.stretch)
            )
        except PermissionError as error:
            raise UserError(
                f"corpus.cache_dir={config.cache_dir}: {folder} cannot be read ({error.strerror}), it may belong to"
                " another user; take another corpus.cache_dir"
            ) from error


def _with_ends(corpus: PreparedCorpus, folder: Path, end: int | None) -> PreparedCorpus:
    """Add the documents that end with an id."""
    if end is None:
        return corpus
    size = corpus.vocab.size
    require(end < size, f"corpus.document_end={end}: must be an id of the corpus, 0 to {size - 1}")
    return replace(corpus, document_ends=cached_ends(folder, corpus.ids, end, corpus.document_ends))


@contextmanager
def _held(lock: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock, if the cache has room for it and its file system knows locks; others then do the same work."""
    file = None
    with suppress(OSError):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note("waiting for another process that prepares the same corpus")
            fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _name(source: Source, found: Scan) -> str:
    """Return the name of a prepared corpus: what made it, and a hash of all that decides what is in it."""
    config = source.config
    parts: list[Any] = []
    if found.documents != 1:
        parts.append(found.ends_sha256)
    if config.vocab_size is not None:
        parts.append(config.vocab_size)
    if config.tokens is Tokens.file:
        parts.append(hashlib.sha256(tokenizer_file(config)).hexdigest())
    sha256 = content_sha256(source, found)
    if parts:
        sha256 = checksum([sha256, *parts])
    return f"{config.name.name}-{config.tokens.name}-{sha256[:16]}-v{FORMAT}"


def _check(source: Source, found: Scan) -> None:
    size = sum(found.units)
    require(size > 0, f"{source.asked}: the text is empty")
    if source.config.name is Corpus.enwik8:
        genuine = size < ENWIK8_BYTES or found.sha256 == ENWIK8_SHA256
        require(
            genuine and next(read_blocks(source.parts[0][0])).startswith(b"<mediawiki "),
            f"{source.asked}: neither enwik8 nor a prefix of it ({size:,} bytes, SHA-256 {found.sha256}); use"
            " corpus=file",
        )


def _open(folder: Path) -> PreparedCorpus:
    try:
        for name in (IDS, META):
            (folder / name).open("rb").close()  # what may not be read is not called damaged
        ids_size = (folder / IDS).stat().st_size
        meta = read_sealed(folder / META, "prepared corpus", FORMAT)
        whole = ids_size == meta["cuts"][-1] * np.dtype(meta["dtype"]).itemsize
        require(whole, f"{IDS} has {ids_size:,} bytes")
        _verify(folder, meta["ids_sha256"])
        ids = np.memmap(folder / IDS, dtype=meta["dtype"], mode="r")
        ends_size = (folder / ENDS).stat().st_size
        require(ends_size == 8 * meta["document_ends"], f"{ENDS} has {ends_size:,} bytes")
        ends = np.memmap(folder / ENDS, "<i8", mode="r") if ends_size else np.empty(0, np.int64)
        vocab = open_vocab(meta, folder)
    except PermissionError:
        raise
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: damaged ({error}); delete it and run again") from error
    return PreparedCorpus(ids, vocab, meta["sha256"], _notes(meta), meta, ends)


def _verify(folder: Path, ids_sha256: str) -> None:
    """Compare the ids with their checksum, unless the file is as it was when that was last done.

    Raises:
        UserError: they differ.
    """
    ids, mark = folder / IDS, folder / _VERIFIED
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
    require(sha256_of(ids) == ids_sha256, f"the sha256 of {IDS} is not the one in {META}")
    with suppress(OSError), replacing(mark) as new:  # as in a cache that only another user may write
        new.write_text(json.dumps(seen), encoding="ascii")


def _notes(meta: dict[str, Any]) -> list[str]:
    if meta["sha256"] == ENWIK8_SHA256:
        return []
    sizes = " / ".join(f"{b - a:,}" for a, b in zip(meta["cuts"], meta["cuts"][1:], strict=False))
    how = "one file or more for each split"
    if meta["proportions"] is not None:
        how = f"split {'/'.join(map(str, meta['proportions']))} in proportion"
    note = f"corpus {meta['source']}: {meta['units']:,} {meta['unit']}s {how}: {sizes} symbols"
    if Tokens[meta["tokens"]] not in BYTES:
        note += f"; {meta['documents']:,} document{'s' * (meta['documents'] != 1)}"
    if meta["corpus"] == Corpus.enwik8.name:
        note += "; a prefix of enwik8 does not compare with published results"
    return [note]
