"""How a split is laid out as streams and cut into segments, for training and for evaluation.

Everything here is a pure function of (ids, numbers): no state, no random numbers, no communication, so any rank can
compute any other rank's batch, and a resumed run needs only the segment index. Ids come from engine/data/corpus.py.

Letters: B streams, Q segment length, C context (ids left of a segment, as many as the longest n-grams of
router or input need).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.data.documents import NO_STARTS, Starts, document_positions, new_documents
from foreroute.engine.data.tokens.vocab import Ids
from foreroute.engine.errors import require


@dataclass(frozen=True, slots=True)
class Batch:
    """One segment of each of B streams."""

    ids_BQ: Tensor  # int64: input ids
    targets_BQ: Tensor  # int64: the next ids
    left_BC: Tensor  # int64: the true ids left of each segment; 0 before the stream's first id
    stream_B: Tensor  # int64: global stream of each row
    index: int  # segments since the start of training: one per optimizer step
    fresh: bool  # first segment of an epoch: memory must be dropped
    position_BQ: Tensor | None = None  # int32: ids of the same document before each id; None where none are known
    place_B: Tensor | None = None
    """int64: where each segment begins in the ids of the split, -1 at the id before them; None: it is of no split."""
    real_BQ: Tensor | None = None  # bool: false for padding, which has no expert; None: there is none

    @property
    def new_document_BX(self) -> Tensor | None:
        """Where documents start, for keys (KeyRows.of): bool [B, C + Q], of left_BC and ids_BQ; None where none are
        known."""
        return None if self.position_BQ is None else new_documents(self.position_BQ, self.left_BC.shape[1])


@dataclass(frozen=True, slots=True)
class Streams:
    """The training layout: contiguous streams of equal length, read side by side, epoch after epoch.

    Example: 23 ids, 2 streams, segments of 4: stream length 11, stream 1 starts at id 11, 2 segments per epoch;
    of each stream ids 0..8 are read and 9..10 dropped, and so is id 22: 5 dropped symbols. With start 0.5 each stream
    begins with its segment 1 (ids 4..8), then an epoch begins anew with segment 0.
    """

    ids: Ids  # [symbols of the split]
    streams: int  # over all ranks and micro-batches
    segment: int  # Q
    context: int  # C
    start: float = 0.0  # where in an epoch the first batch lies, as a fraction of it
    document_starts: Starts = field(default_factory=lambda: NO_STARTS)  # positions in ids

    def __post_init__(self) -> None:
        need = self.streams * (self.segment + 1)
        require(
            len(self.ids) >= need,
            f"data.streams={self.streams}, data.segment={self.segment}: need a training split of at least "
            f"{self.streams} x ({self.segment} + 1) = {need} symbols, this one has {len(self.ids)}",
        )

    @property
    def stream_length(self) -> int:
        """Ids from the start of one stream to the start of the next."""
        return len(self.ids) // self.streams

    @property
    def segments_per_epoch(self) -> int:
        """Segments in one pass over the split."""
        return (self.stream_length - 1) // self.segment

    @property
    def dropped_symbols(self) -> int:
        """Symbols of the split that no epoch reads, neither as input nor as target."""
        return len(self.ids) - self.streams * (self.segments_per_epoch * self.segment + 1)

    def batch(self, index: int, streams: Sequence[int]) -> Batch:
        """Cut segment `index`, counted from the start of training, out of the given global streams."""
        epoch = self.segments_per_epoch
        position = (index + int(self.start * epoch)) % epoch
        stream_B = np.asarray(streams, dtype=np.int64)
        first_B = stream_B * self.stream_length
        start_B = first_B + position * self.segment
        window = _window(self.ids, start_B, first_B, self.segment, self.context)
        position_BQ = None
        if len(self.document_starts):
            position_BQ = document_positions(self.document_starts, start_B, self.segment)
        return _to_batch(window, self.context, stream_B, start_B, position_BQ, index=index, fresh=position == 0)

    def streams_of(self, rank: int, micro: int, *, world: int, accumulation: int) -> range:
        """Return which global streams a rank runs in a micro-batch: rank by rank, micro-batch by micro-batch.

        Example: 8 streams, world 2, accumulation 2:

            |        | micro 0 | micro 1 |
            | rank 0 | 0, 1    | 2, 3    |
            | rank 1 | 4, 5    | 6, 7    |
        """
        if not (0 <= rank < world and 0 <= micro < accumulation):
            raise ValueError(f"rank={rank} of {world}, micro={micro} of {accumulation}: out of range")
        if self.streams % (world * accumulation):
            raise ValueError(f"streams={self.streams}: not a multiple of {world} x {accumulation}")
        count = self.streams // (world * accumulation)
        first = (rank * accumulation + micro) * count
        return range(first, first + count)


@dataclass(frozen=True, slots=True)
class EvalShares:
    """The evaluation layout: which positions each stream runs, and which of them count.

    Position p predicts symbol p of the split from the input symbol p - 1; each position counts in exactly one stream.
    Stream i runs [i * stride, i * stride + warm_up + stride) and counts what follows its warm-up; stream 0 counts all.
    The warm-up and the starts are multiples of the segment: cuts fall on the same positions for any number of streams.

    Example: 20 symbols, 3 streams, segment 2, warm 3 -> warm_up 4, stride 6: stream 0 runs and counts 0..9, stream 1
    runs 6..15 and counts 10..15, stream 2 runs 12..21 and counts 16..19.
    """

    num_symbols: int  # of the split
    requested_streams: int
    segment: int  # Q
    warm: int  # symbols that fill the memory before a share; see warm_symbols()

    def __post_init__(self) -> None:
        require(self.num_symbols >= 1, "the split to evaluate is empty")

    @property
    def warm_up(self) -> int:
        """Uncounted symbols at the start of every stream but the first: `warm` in whole segments."""
        return _round_up(self.warm, self.segment)

    @property
    def stride(self) -> int:
        """Symbols from the start of one stream to the start of the next."""
        rest = max(self.num_symbols - self.warm_up, 1)
        return _round_up(-(-rest // self.requested_streams), self.segment)

    @property
    def streams(self) -> int:
        """Streams that have something to count: fewer than requested on a short split."""
        return max(-(-(self.num_symbols - self.warm_up) // self.stride), 1)

    @property
    def num_segments(self) -> int:
        """Forward passes; each takes one segment of every stream."""
        one_stream = self.streams == 1
        length = self.num_symbols if one_stream else self.warm_up + self.stride
        return -(-length // self.segment)


def warm_symbols(layers: int, memory: int, segment: int) -> int:
    """Count the symbols that make a stream's memory independent of where the stream starts.

    A layer reads `memory` positions left of its segment, and those belong to whole segments that read as far again:
    layers x memory is enough only where memory is a multiple of the segment.
    """
    return layers * _round_up(memory, segment)


def eval_batches(
    ids: Ids, previous_id: int, shares: EvalShares, context: int, document_starts: Starts = NO_STARTS
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield (batch, counted_BQ bool) segment by segment; `fresh` at the first only.

    Args:
        ids: [shares.num_symbols] the split.
        previous_id: id just before the split, the input that predicts its first symbol.
        context: C; the left context is the true one across stream starts, and 0 before previous_id.
        document_starts: positions in ids. If the split itself starts a document, previous_id is of another one.

    Ids past the end of the split are 0 and never counted.
    """
    if len(ids) != shares.num_symbols:
        raise ValueError(f"len(ids)={len(ids)}: shares were made for {shares.num_symbols} symbols")
    stream_B = np.arange(shares.streams)
    offset_Q = np.arange(shares.segment)
    for index in range(shares.num_segments):
        offset = index * shares.segment
        start_B = stream_B * shares.stride + offset
        # the input of a position is the id before it
        window = _window(ids, start_B - 1, np.full_like(start_B, -1), shares.segment, context)
        position = start_B[:, None] + np.arange(-context, shares.segment + 1)
        window[torch.from_numpy(position == 0)] = previous_id
        position_BQ = None
        if len(document_starts):  # input p is symbol p - 1 of the split
            position_BQ = document_positions(document_starts, start_B - 1, shares.segment, text_start=-1)
        warmed_B = (stream_B == 0) | (offset >= shares.warm_up)
        inside_BQ = start_B[:, None] + offset_Q < shares.num_symbols
        counted_BQ = torch.from_numpy(warmed_B[:, None] & inside_BQ)
        batch = _to_batch(window, context, stream_B, start_B - 1, position_BQ, index=index, fresh=index == 0)
        yield batch, counted_BQ


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _window(ids: Ids, start_B: NDArray[np.int64], first_B: NDArray[np.int64], segment: int, context: int) -> Tensor:
    """Read ids [B, C + Q + 1] around each segment start; 0 left of first_B and past the end."""
    position = start_B[:, None] + np.arange(-context, segment + 1)
    known = (position >= first_B[:, None]) & (position < len(ids))
    found = ids[np.clip(position, 0, len(ids) - 1)]
    return torch.from_numpy(np.where(known, found, 0).astype(np.int64))


def _to_batch(
    window: Tensor,
    context: int,
    stream_B: NDArray[np.int64],
    place_B: NDArray[np.int64],
    position_BQ: Tensor | None,
    *,
    index: int,
    fresh: bool,
) -> Batch:
    return Batch(
        ids_BQ=window[:, context:-1].contiguous(),
        targets_BQ=window[:, context + 1 :].contiguous(),
        left_BC=window[:, :context].contiguous(),
        stream_B=torch.from_numpy(stream_B),
        index=index,
        fresh=fresh,
        position_BQ=position_BQ,
        place_B=torch.from_numpy(place_B),
    )
