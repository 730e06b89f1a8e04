"""The source of a corpus as one stream of documents, read as often as needed, and what is known of it after one pass.

What a pass finds is kept in the cache beside the state of the files, so that a source that has not changed is not read
again at the start of every run.
"""

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product, takewhile
from pathlib import Path

from foreroute.engine.config import Corpus, CorpusConfig, Tokens
from foreroute.engine.data.sources.files import SourceFile, find_files, is_packed, read_blocks, state_of
from foreroute.engine.data.sources.ids import read_ids
from foreroute.engine.data.sources.pieces import Cuts, Piece, cut
from foreroute.engine.data.sources.text import json_field, read_json_lines, read_plain
from foreroute.engine.data.tokens.build import BYTES
from foreroute.engine.errors import require
from foreroute.engine.sealed_files import checksum, replacing

_FORMAT = 2  # of what a pass leaves in the cache
_NOT_STDLIB = {"test", "tests", "idlelib", "site-packages"}
Pieces = Iterator[Piece]
Watch = Callable[[int], None]  # is given how many bytes or ids more have been read


@dataclass(frozen=True, slots=True)
class Scan:
    """The result of one pass over a source. Units are bytes of text, or ids."""

    sha256: str  # of all that is read, one document after the other
    ends_sha256: str  # of the places where documents end
    parts_sha256: list[str]  # of each part
    units: list[int]  # of each part
    documents: int
    values: list[int]  # byte values that occur, ascending
    largest_id: int


@dataclass(frozen=True, slots=True)
class Source:
    """Files, in the order in which they are read."""

    config: CorpusConfig
    parts: list[list[SourceFile]]  # one, cut by proportion; or one for each split, or for each corpus of a mixture
    name: str  # for people
    asked: str  # the options that chose it, for error lines
    is_text: bool = True  # and not ids

    def unit(self, number: int) -> str:
        """Name so many units."""
        return f"{number:,} {'bytes' if self.is_text else 'ids'}"

    @property
    def is_packed(self) -> bool:
        """Whether a file of text is gzip or zstd, as far as the files can be read."""
        with suppress(OSError):
            return self.is_text and any(is_packed(file.path) for part in self.parts for file in part)
        return False

    @property
    def expected(self) -> int:
        """Bytes of its files, where that is what there is to read; 0: some are packed, or hold ids."""
        with suppress(OSError):
            if self.is_text and not self.is_packed:
                return sum(file.path.stat().st_size for part in self.parts for file in part)
        return 0

    def pieces(self, part: int) -> Pieces:
        """Yield the documents of a part.

        Raises:
            UserError: a file cannot be read, or is broken.
        """
        if self.config.name is Corpus.stdlib:  # all of it is one document
            for file in self.parts[part]:
                yield from (Piece(block, False) for block in read_blocks(file))
            yield Piece(b"", True)
            return
        for file in self.parts[part]:
            field = json_field(file, self.config.field)
            if not self.is_text:
                yield from read_ids(file, self.config.dtype)
            elif field is None:
                yield from read_plain(file, utf8=self.config.tokens not in BYTES)
            else:
                yield from read_json_lines(file, field)

    @property
    def by_split(self) -> bool:
        """Each split has files of its own."""
        return self.config.valid_path is not None

    def splits(self, scan: Scan) -> Iterator[tuple[tuple[int, int], Piece]]:
        """Yield all documents with the number of their split, 0 train, 1 valid, 2 test, and of their part.

        Splits come one after the other, in each of them the corpora of a mixture.
        """
        if self.by_split:
            for place in range(len(self.parts)):
                yield from (((place, 0), piece) for piece in self.pieces(place))
        elif len(self.parts) == 1:
            yield from (((place, 0), piece) for place, piece in self._cut(0, scan))
        else:
            for place, part in product(range(len(self.config.proportions)), range(len(self.parts))):
                upto = takewhile(lambda found, last=place: found[0] <= last, self._cut(part, scan))  # type: ignore[misc]
                yield from (((place, part), piece) for split, piece in upto if split == place)

    def _cut(self, part: int, scan: Scan) -> Iterator[tuple[int, Piece]]:
        total, parts = scan.units[part], self.config.proportions
        at = [total * sum(parts[:place]) // sum(parts) for place in range(1, len(parts))]
        slack = 0 if scan.documents == 1 else total // 100
        return cut(self.pieces(part), Cuts(at, self.config.tokens in BYTES, slack))

    def signature(self) -> str:
        """Return what changes when the files, or how they are read, do.

        Raises:
            OSError: a file is gone.
        """
        config = self.config
        files = [[(str(f.path.absolute()), *state_of(f.path)) for f in part] for part in self.parts]
        if not self.is_text:
            files += [[("", *state_of(_index(f))) for f in part if _index(f).is_file()] for part in self.parts]
        reading = [config.name.name, config.field, config.dtype, self.is_text, config.tokens in BYTES]
        return checksum([_FORMAT, reading, files])[:32]


def find_source(config: CorpusConfig, enwik8: Path) -> Source:
    """Find the files of a corpus.

    Args:
        enwik8: where a downloaded copy is.

    Raises:
        UserError: there are none, or something is no file.
    """
    if config.name is Corpus.stdlib:
        root, asked = Path(sysconfig.get_paths()["stdlib"]), "corpus=stdlib"
        files = [SourceFile(path, f"{asked}: {path}") for path in _stdlib_files(root)]
        return Source(config, [files], f"Python {platform.python_version()} standard library", asked)
    if config.path is None:  # only enwik8 needs none
        require(
            enwik8.exists(),
            f"corpus=enwik8: no local copy at {enwik8}; run `python -m launch.prepare corpus=enwik8` or give "
            "corpus.path=FILE",
        )
        return Source(config, [[SourceFile(enwik8, "corpus=enwik8")]], "enwik8", "corpus=enwik8")
    named = [("corpus.path", config.path)]
    if config.valid_path is not None:
        named += [("corpus.valid_path", config.valid_path), ("corpus.test_path", config.test_path)]
    if config.weights is not None:
        named = [("corpus.path", asked) for asked in config.path]
    parts = [find_files(asked, option) for option, asked in named]
    if config.tokens in (Tokens.ids, Tokens.file):
        parts = [_pairs(part) for part in parts]
    words = config.path if isinstance(config.path, str) else f"[{', '.join(config.path)}]"
    single = isinstance(config.path, str) and len(parts) == 1
    is_text = config.tokens is not Tokens.ids
    if config.tokens is Tokens.file:
        is_text = not any(_holds_ids(file, config) for part in parts for file in part)
    return Source(config, parts, Path(words).name if single else words, f"corpus.path={words}", is_text)


def _pairs(files: list[SourceFile]) -> list[SourceFile]:
    """Name each Megatron pair once, by its .bin."""
    named = [SourceFile(f.path.with_suffix(".bin"), f.label) if f.path.suffix == ".idx" else f for f in files]
    return list({file.path: file for file in named}.values())


def _holds_ids(file: SourceFile, config: CorpusConfig) -> bool:
    """Whether a file that is read by a tokenizer.json holds its ids, and no text."""
    return file.path.suffix == ".npy" or config.dtype is not None or _index(file).is_file()


def _index(file: SourceFile) -> Path:
    return file.path.with_suffix(".idx")


def _stdlib_files(root: Path) -> list[Path]:
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_STDLIB]  # site-packages may hold most of the files
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


def scan(source: Source, cache: Path, watch: Watch) -> Scan:
    """Read a source once, unless it is as it was when that was last done.

    Args:
        cache: folder in which to remember it.

    Raises:
        UserError: a file cannot be read, or is broken.
    """
    file = cache / f"{source.signature()}.json"
    with suppress(OSError, ValueError, TypeError):
        return Scan(**json.loads(file.read_bytes()))
    found = _read_once(source, watch)
    with suppress(OSError):  # as in a cache that only another user may write
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as new:
            new.write_text(json.dumps(asdict(found)), encoding="ascii")
    return found


def _read_once(source: Source, watch: Watch) -> Scan:
    whole, ends, units, parts_sha256 = hashlib.sha256(), hashlib.sha256(), [], []
    position = documents = 0
    values, largest = b"", -1
    for part in range(len(source.parts)):
        start, alone = position, hashlib.sha256()
        for piece in source.pieces(part):
            data = piece.data
            for found in (whole, alone) if len(source.parts) > 1 else (whole,):
                found.update(piece.hashed)
            if isinstance(data, bytes):
                values += bytes(set(data.translate(None, values)))
            elif len(data):
                largest = max(largest, int(data.max()))
            position += len(data)
            if piece.ends:
                documents += 1
                ends.update(position.to_bytes(8, "little"))
            watch(len(data))
        units.append(position - start)
        parts_sha256.append((alone if len(source.parts) > 1 else whole).hexdigest())
    return Scan(whole.hexdigest(), ends.hexdigest(), parts_sha256, units, documents, sorted(values), largest)
