"""Write a prepared corpus: the ids of the three splits one after the other, where documents end, and the vocabulary.

The source is read once to know its size and content (engine/data/sources/source.py), once more for a vocabulary that
is learned from its training split, and once to turn it into ids; nothing holds more than a few blocks of it. The folder
is written aside, made durable and then renamed, so that nobody sees a part of it.
"""

import fcntl
import hashlib
import json
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np

from foreroute.engine.config import Corpus, Split
from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.data.sources.source import Scan, Source
from foreroute.engine.data.tokens.build import make_vocab, stated
from foreroute.engine.data.tokens.vocab import Vocab, ids_dtype
from foreroute.engine.errors import UserError, require
from foreroute.engine.sealed_files import checksum, sealed, sync

FORMAT = 4
"""Of a prepared corpus; part of its folder's name, so that another version makes its own."""
IDS, ENDS, META = "ids.bin", "document_ends.bin", "meta.json"
SPLITS = tuple(Split)  # in the order of the text
_EVERY_S = 10.0  # between lines of progress
_LEFT_S = 3600.0  # after which an unfinished corpus counts as left behind
Note = Callable[[str], None]


class Meter:
    """Lines that say how far a pass over a source is, and how long it will still take."""

    def __init__(self, note: Note, what: str, total: Callable[[], int], unit: Callable[[int], str]) -> None:
        self._note, self._what, self._total, self._unit = note, what, total, unit
        self._done, self._start = 0, time.monotonic()
        self._said = self._start

    def __call__(self, more: int) -> None:
        """Count what has been read."""
        self._done += more
        now = time.monotonic()
        if now - self._said >= _EVERY_S and self._done:
            self._said = now
            total = self._total()
            left = (total - self._done) * (now - self._start) / self._done
            of = f" of {self._unit(total)}, about {max(left, 0):,.0f} s left" if total else ""
            self._note(f"{self._what}: {self._unit(self._done)}{of}")


def write(folder: Path, source: Source, scan: Scan, note: Note) -> None:
    """Prepare a corpus in `folder`; if another process was faster, keep its folder.

    Raises:
        UserError: a split would be empty, the vocabulary cannot be made, the source has changed since `scan`, or the
            folder cannot be written.
    """
    _remove_left_behind(folder)
    aside = folder.with_name(f"{_aside(folder)}{uuid.uuid4().hex}")
    try:
        aside.mkdir(parents=True)
        with (aside / IDS).open("wb") as ids:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(ids, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write(aside, source, scan, ids, note)
            aside.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise UserError(
                f"corpus.cache_dir={source.config.cache_dir}: {folder} cannot be written ({error.strerror})"
            ) from error
    finally:  # of a signal, too
        shutil.rmtree(aside, ignore_errors=True)


def _write(aside: Path, source: Source, scan: Scan, ids: IO[bytes], note: Note) -> None:
    vocab = _vocab(source, scan, note)
    for name, content in vocab.files().items():
        (aside / name).write_bytes(content)
    with (aside / ENDS).open("wb") as ends:
        found = _encode(source, scan, vocab, ids, ends, Meter(note, "ids", lambda: sum(scan.units), source.unit))
    ids.flush()
    require(vocab.size > 1, f"{source.asked}: has one symbol only; corpus.tokens=bytes takes it, with nothing to learn")
    meta = {
        "format": FORMAT,
        "dtype": np.dtype(ids_dtype(vocab.size)).name,
        "source": source.name,
        "corpus": source.config.name.name,
        "tokens": source.config.tokens.name,
        **stated(vocab),
        "sha256": content_sha256(source, scan),
        "documents": scan.documents,
        "python": platform.python_version() if source.config.name is Corpus.stdlib else None,
        "unit": "byte" if source.is_text else "id",
        "proportions": None if source.by_split else source.config.proportions,
        **found,
    }
    (aside / META).write_text(json.dumps(sealed(meta)), encoding="ascii")
    for path in (*sorted(aside.iterdir()), aside):
        sync(path)


def _aside(folder: Path) -> str:
    """Return how the name of a folder begins in which this machine writes a corpus."""
    return f".{folder.name}.{platform.node()}."


def _remove_left_behind(folder: Path) -> None:
    """Delete what a process that was killed has written of this corpus."""
    for aside in folder.parent.glob(f".{folder.name}.*"):
        with suppress(OSError):
            if _left_behind(aside, aside.name.startswith(_aside(folder))):
                shutil.rmtree(aside)


def _left_behind(aside: Path, of_this_machine: bool) -> bool:
    """Return whether nobody writes in a folder: its lock is free or, where that cannot be known, nothing in it has
    changed for an hour."""
    if of_this_machine:
        try:
            with (aside / IDS).open("r+b") as ids:
                fcntl.flock(ids, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    newest = max(path.stat().st_mtime for path in (aside, *aside.iterdir()))
    return time.time() - newest > _LEFT_S


def content_sha256(source: Source, scan: Scan) -> str:
    """Return the sha256 by which a run knows its text: of the text itself, where it is cut by the usual proportions."""
    how: list[Any] = [] if len(source.parts) == 1 else [scan.units]
    if source.config.proportions != [90, 5, 5] and not source.by_split:
        how.append(source.config.proportions)
    if len(source.parts) > 1 and not source.by_split:
        how.append("mixture")
    return checksum([scan.sha256, *how]) if how else scan.sha256


def _vocab(source: Source, scan: Scan, note: Note) -> Vocab:
    config = source.config

    def training() -> Iterator[Piece]:
        total = scan.units[0] if source.by_split else sum(scan.units) * config.proportions[0] // sum(config.proportions)
        meter = Meter(note, f"vocabulary ({config.tokens.name})", lambda: total, source.unit)
        for (place, _), piece in source.splits(scan):
            if place:
                return
            meter(len(piece.data))
            yield piece

    return make_vocab(config, values=bytes(scan.values), largest_id=scan.largest_id, training=training)


def _encode(source: Source, scan: Scan, vocab: Vocab, ids: IO[bytes], ends: IO[bytes], meter: Meter) -> dict[str, Any]:
    """Write the ids and the ends of documents; returns what meta.json says of them."""
    units, symbols, spelled = ([0] * len(SPLITS) for _ in range(3))
    last_end = num_ends = 0
    corpora: list[int] = []  # of a mixture: where in the training split each ends
    ids_hash, part_hashes = hashlib.sha256(), [hashlib.sha256() for _ in source.parts]

    def counted(pieces: Iterator[tuple[tuple[int, int], Piece]]) -> Iterator[Piece]:
        for (place, part), piece in pieces:
            units[place] += len(piece.data)
            part_hashes[place if source.by_split else part].update(piece.hashed)
            meter(len(piece.data))
            yield piece

    for (place, _), pieces in groupby(source.splits(scan), key=lambda found: found[0]):
        first = sum(symbols[:place])
        for encoded in vocab.encode_pieces(counted(pieces)):
            end_d = first + symbols[place] + encoded.ends
            end_d = np.unique(end_d[end_d > last_end])  # a document may be empty
            ends.write(end_d.astype("<i8").tobytes())
            num_ends += len(end_d)
            last_end = int(end_d[-1]) if len(end_d) else last_end
            ids.write(encoded.ids.data)
            ids_hash.update(encoded.ids.data)
            symbols[place] += len(encoded.ids)
            spelled[place] += encoded.spelled
        if place == 0:
            corpora.append(symbols[0])
    unchanged = [found.hexdigest() for found in part_hashes] == scan.parts_sha256
    require(unchanged, f"{source.asked}: has changed while it was read; run again")
    for place, split in enumerate(SPLITS):
        why = "in three parts" if source.by_split else "are too short for three splits"
        require(
            symbols[place] > 0, f"{source.asked}: {source.unit(sum(scan.units))} {why}, the {split.name} split is empty"
        )
    if not source.by_split and len(source.parts) > 1:
        whole = len(corpora) == len(source.parts) and corpora == sorted(set(corpora)) and corpora[0] > 0
        require(whole, f"{source.asked}: {source.unit(sum(scan.units))}, a corpus of the mixture has none to train on")
    return {
        "ids_sha256": ids_hash.hexdigest(),
        "document_ends": num_ends,
        "units": sum(units),
        "cuts": np.cumsum([0, *symbols]).tolist(),  # ids where the splits begin, and the end
        "unit_cuts": np.cumsum([0, *units]).tolist(),
        "spelled": spelled,
        "corpora": corpora,
    }
