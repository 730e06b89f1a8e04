"""The bytes from rank to rank of every step, as a file that a network simulator can read.

A CSV file, compressed if its name ends in .gz, with one line for each pair of ranks of which one sends the other
anything in a step, all layers, micro-batches and directions together, by the run's exchange:

    step,source,destination,bytes
    1,0,3,122880

Steps are counted from 1, ranks from 0. Rows of experts' inputs, of results and of the gradients of both are in it. What
data parallelism sends is not. A step is written when it is counted, so memory does not grow with the run. The sums are
those of the certificate (engine/certificate/counts/exact.py).

Letters: y layers, m micro-batches, g expert groups, P ranks of a group.
"""

import csv
import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.certificate.counts.exact import counted_kind
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.replay import StepCounts, replay
from foreroute.engine.certificate.counts.traffic import hops
from foreroute.engine.data.documents import NO_STARTS, Starts
from foreroute.engine.data.tokens.vocab import Ids
from foreroute.engine.errors import require
from foreroute.engine.routing.planned_router import PlannedRouter

HEADER = "step", "source", "destination", "bytes"
MOST_RANKS = 4096


def write_traffic(
    path: Path,
    layout: Layout,
    ids: Ids,
    routers: Sequence[PlannedRouter],
    steps: range,
    document_starts: Starts = NO_STARTS,
) -> int:
    """Write the steps; return the bytes of all of them. Arguments as for certify.

    Raises:
        UserError: the run has more than MOST_RANKS ranks, or cannot be laid out on them.
    """
    world, total = layout.placement.world_size, 0
    require(world <= MOST_RANKS, f"world_size={world}: trace is for at most {MOST_RANKS} ranks")
    with _opened(path) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(HEADER)
        for step, counts in _in_order(layout, ids, routers, steps, document_starts):
            bytes_gPP = step_bytes(layout, counts)
            group_X, from_X, to_X = bytes_gPP.nonzero()
            first_X = group_X * layout.placement.expert_ranks
            sent_X = bytes_gPP[group_X, from_X, to_X]
            lines = np.stack([np.full_like(sent_X, step + 1), first_X + from_X, first_X + to_X, sent_X], axis=1)
            rows.writerows(lines.tolist())
            total += int(sent_X.sum())
    return total


def step_bytes(layout: Layout, counts: StepCounts) -> NDArray[np.int64]:
    """Return the bytes from each rank of a group to each other in a step [g, P, P].

    Results and their gradients go the other way than the rows.
    """
    kind = counted_kind(layout.exchange(counts.k))
    hops_ygPP = hops(counts, kind, layout.placement, layout.tokens).sum(axis=1)
    to_experts_y, to_tokens_y = np.array(layout.layer_trips).T[..., None, None, None]
    rows_ygPP = to_experts_y * hops_ygPP + to_tokens_y * hops_ygPP.swapaxes(2, 3)
    found: NDArray[np.int64] = rows_ygPP.sum(axis=0) * layout.row_bytes
    return found


def _in_order(
    layout: Layout, ids: Ids, routers: Sequence[PlannedRouter], steps: range, document_starts: Starts
) -> Iterator[tuple[int, StepCounts]]:
    """Count step after step. Inside a pass over the text no step does what another does, so none is left out."""
    per_pass = layout.read(ids, document_starts).segments_per_epoch
    for first in range(steps.start, steps.stop, per_pass):
        part = range(first, min(first + per_pass, steps.stop))
        for counts in replay(layout, ids, routers, part, document_starts):
            yield counts.step, counts


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    if path.suffix == ".gz":
        with gzip.open(path, "wt", compresslevel=1) as packed:
            yield cast(TextIO, packed)
    else:
        with path.open("w") as file:
            yield file
