"""Where documents start in a text, and where the ids of a segment lie in their documents.

Document starts are a sorted int64 array of positions in the text, memory-mapped where it is large: the places where
another document ends. The document before the first of them starts with the text. Only the starts of the documents that
a segment touches are read (numpy.searchsorted). Keys of n-grams stop at document starts (engine/routing/ngram_rows.py);
attention does too where data.reset_memory asks for it (engine/model/transformer_xl.py).

Letters: B streams, Q segment length, C ids left of a segment, X = C + Q.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.errors import require
from foreroute.engine.sealed_files import replacing

Starts = NDArray[np.int64]
"""Positions of a text at which documents start, ascending; empty where none are known."""

NO_STARTS: Starts = np.empty(0, np.int64)

_CHUNK = 1 << 24  # ids searched at a time


def ends_at(ids: NDArray[Any], end: int) -> Starts:
    """Return the place after each id `end`, the last id of a document: where the next one starts, if there is one.

    Example: ids [5, 0, 6, 7, 0, 0, 8] with end 0 are the documents [5, 0], [6, 7, 0], [0] and [8]: places [2, 5, 6].
    """
    found = [
        np.flatnonzero(np.asarray(ids[place : place + _CHUNK]) == end) + (place + 1)
        for place in range(0, len(ids), _CHUNK)
    ]
    return np.concatenate([NO_STARTS, *found])


def cached_ends(folder: Path, ids: NDArray[Any], end: int, known: Starts = NO_STARTS) -> Starts:
    """Return ends_at(ids, end) of a prepared corpus and the ends that are known of it already, memory-mapped from its
    folder, where the first call puts them.

    Raises:
        UserError: no document ends before the last id.
    """
    path = folder / f"document-ends-{end}.npy"
    with suppress(OSError, ValueError, EOFError):  # not there yet, or damaged
        ends: Starts = np.load(path, mmap_mode="r", allow_pickle=False)
        if ends.dtype == np.int64 and ends.ndim == 1 and 0 < ends[:1].sum() <= ends[-1:].sum() <= len(ids):
            return ends
    ends = ends_at(ids, end)
    require(
        bool(ends.size) and bool(ends[0] < len(ids)),
        f"corpus.document_end={end}: no document ends before the last id of the corpus; take an id that does",
    )
    ends = np.union1d(known, ends)
    with suppress(OSError), replacing(path) as new, new.open("wb") as file:  # another user's cache may not be written
        np.save(file, ends, allow_pickle=False)
    return ends


def document_positions(starts: Starts, first_B: NDArray[np.int64], segment: int, *, text_start: int = 0) -> Tensor:
    """Return how many ids of the same document lie before each id of a segment: int32 [B, Q], at most 2^31 - 1.

    Args:
        starts: of the documents.
        first_B: position in the text of each segment's first id.
        text_start: position of the text's first id, where the document before the first start starts.

    Example: documents start at 0, 3 and 4; the segment of 4 ids at 1 is at the positions 1, 2, 0 and 0 of its
    documents, that at 3 at 0, 0, 1 and 2.
    """
    before_B = np.searchsorted(starts, first_B, side="right")  # starts up to the segment's first id
    after_B = np.searchsorted(starts, first_B + segment, side="left")  # starts before the segment's end
    start_BQ = np.full((len(first_B), segment), text_start, np.int64)
    known_B = before_B > 0
    start_BQ[known_B, 0] = starts[before_B[known_B] - 1]
    count_B = after_B - before_B  # starts inside the segment
    row = np.repeat(np.arange(len(first_B)), count_B)
    place = np.arange(row.size) - np.repeat(np.cumsum(count_B) - count_B, count_B)
    inside = starts[before_B[row] + place]
    start_BQ[row, inside - first_B[row]] = inside
    np.maximum.accumulate(start_BQ, axis=1, out=start_BQ)
    position_BQ = first_B[:, None] + np.arange(segment) - start_BQ
    return torch.from_numpy(np.minimum(position_BQ, np.iinfo(np.int32).max).astype(np.int32))


def new_documents(position_BQ: Tensor, context: int) -> Tensor:
    """Mark where documents start among `context` ids left of each segment and the segment's own: bool [B, C + Q].

    Of the ids left only the start of the first id's document is marked, since no key of the segment reaches beyond it.

    Args:
        position_BQ: as from document_positions.

    Example: positions [[2, 0, 1]] and 3 ids left: the first id's document starts 2 ids before it, so the marks are
    [[0, 1, 0, 0, 1, 0]].
    """
    before_C = torch.arange(context, 0, -1)
    return torch.cat([position_BQ[:, :1] == before_C, position_BQ == 0], dim=1)
