"""Files of ids that somebody made before: NumPy's .npy, raw numbers, and Megatron-LM's pair of .idx and .bin.

The pair's format is that of Megatron-LM's megatron/core/datasets/indexed_dataset.py: a header of 34 bytes, the length
of each sequence (int32), the place of each in the .bin (int64, bytes), and the sequences at which documents begin
(int64, the last is the end).
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.data.sources.files import SourceFile, reading
from foreroute.engine.data.sources.pieces import Piece
from foreroute.engine.errors import UserError, require

_CHUNK = 1 << 20  # ids
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
LARGEST_ID = 2**31 - 1


def read_ids(file: SourceFile, dtype: str | None) -> Iterator[Piece]:
    """Yield the ids of a file, in pieces of documents.

    Args:
        file: a .npy file, the .idx or .bin of a Megatron pair, or a raw file.
        dtype: of a raw file, such as uint16.

    Raises:
        UserError: the file cannot be read or is none of these; an id is negative or beyond 2**31 - 1.
    """
    path, done = file.path, 0
    with reading(file):
        if path.suffix == ".npy":
            documents = iter([_npy(file)])
        elif dtype is None and path.with_suffix(".idx").is_file():
            documents = _megatron(path.with_suffix(".idx"), file)
        else:
            require(dtype is not None, f"{file.label}: raw ids need corpus.dtype=, such as uint16")
            documents = iter([_raw(path, np.dtype(dtype), file)])
        for ids in documents:
            for start in range(0, len(ids), _CHUNK):
                part = ids[start : start + _CHUNK]
                _check(part, done + start, file)
                yield Piece(part, start + _CHUNK >= len(ids))
            done += len(ids)


def _check(ids: NDArray[np.integer[Any]], position: int, file: SourceFile) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high > LARGEST_ID:
        place = int(np.argmax((ids < 0) | (ids > LARGEST_ID)))
        raise UserError(f"{file.label}: id {ids[place]} at place {position + place:,}: must be from 0 to 2**31 - 1")


def _npy(file: SourceFile) -> NDArray[np.integer[Any]]:
    try:
        ids = np.load(file.path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{file.label}: not a .npy file of numbers ({error})") from None
    require(
        isinstance(ids, np.ndarray) and ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer),
        f"{file.label}: holds {ids.dtype} of shape {ids.shape}, must be whole numbers in one row",
    )
    return ids  # type: ignore[no-any-return]


def _raw(path: Path, dtype: np.dtype[Any], file: SourceFile) -> NDArray[np.integer[Any]]:
    size = path.stat().st_size
    require(size % dtype.itemsize == 0, f"{file.label}: {size:,} bytes are no whole number of {dtype.name}")
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)


def _megatron(index: Path, file: SourceFile) -> Iterator[NDArray[np.integer[Any]]]:
    """Yield the documents of a Megatron pair."""
    content = np.memmap(index, np.uint8, mode="r") if index.stat().st_size else np.empty(0, np.uint8)
    require(content.size >= _HEADER.size, f"{file.label}: {index} is no Megatron index")
    magic, version, code, sequences, marks = _HEADER.unpack(content[: _HEADER.size].tobytes())
    whole = magic == _MAGIC and version == 1 and code in _DTYPES
    require(whole, f"{file.label}: {index} is no Megatron index of ids (version 1)")
    ends = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * marks])
    require(content.size >= ends[-1], f"{file.label}: {index} has {content.size:,} bytes, needs {ends[-1]:,}")
    length_s, place_s, first_d = (
        content[start:end].view(dtype)
        for start, end, dtype in zip(ends, ends[1:], (np.int32, np.int64, np.int64), strict=False)
    )
    ids = _raw(index.with_suffix(".bin"), np.dtype(_DTYPES[code]), file)
    end_s = np.cumsum(length_s, dtype=np.int64)
    followed = bool((place_s == (end_s - length_s) * ids.itemsize).all()) and end_s[-1:].sum() == len(ids)
    require(followed, f"{file.label}: {index} does not name the ids of its .bin one after the other")
    start = 0
    for last in first_d[first_d > 0]:
        yield ids[start : end_s[last - 1]]
        start = int(end_s[last - 1])
    if start < len(ids):
        yield ids[start:]
