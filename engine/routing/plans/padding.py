"""Plans of equal shapes: padded to bounds that a run's certificate knows, so that one traced graph serves all of them.

Rows from each rank to each other are padded to as many, and so are a rank's expert rows. Padding is sent, but no expert
reads it, and no sum has it in it: outputs and gradients have the same bits (kernels/expert_index.py says how padding is
marked). On one rank shapes are equal without it. With all rows on every rank (gather) only the expert rows are padded.

Letters: P ranks of the expert group, S sent and R received rows, N expert rows; after padding S = R = P * pair_rows.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from foreroute.engine.errors import RunFailed
from foreroute.engine.routing.plan import Chunk, Plan
from foreroute.kernels.expert_index import ExpertRows


class RowBounds(NamedTuple):
    """The most that any plan of a run has at one k, on any rank and in any layer (a certificate's StepStatistics)."""

    pair_rows: int  # rows from one rank to one rank, itself included (static.pair_rows)
    expert_rows: int  # expert rows of one rank (computed_rows.max)


def pad_plan(plan: Plan, bounds: RowBounds) -> Plan:
    """Pad a plan; the plans of all ranks of its expert group must be padded alike.

    Raises:
        RunFailed: the plan has more rows than a bound says, named with it; or its weights are live.
    """
    if len(plan.chunks[0].send_splits) == 1:
        return plan
    return replace(plan, chunks=tuple(_pad_chunk(chunk, bounds) for chunk in plan.chunks))


def _pad_chunk(chunk: Chunk, bounds: RowBounds) -> Chunk:
    rows, most = chunk.rows, bounds.expert_rows
    if chunk.weight_N is None:
        raise RunFailed("plans of moe.weights=live cannot be padded: their weights are made in the step")
    if rows.num_rows > most:
        raise RunFailed(f"a plan has {rows.num_rows} expert rows: its bound is {most}")
    if chunk.send is None:
        return replace(chunk, rows=rows.padded(most), weight_N=_longer(chunk.weight_N, most))
    pair = bounds.pair_rows
    if (rows_P := max(*chunk.send_splits, *chunk.recv_splits)) > pair:
        raise RunFailed(f"a plan has {rows_P} rows from one rank to another: its bound is {pair}")
    assert chunk.received_R is not None
    ranks = len(chunk.send_splits)
    send_S, recv_R = _places(chunk.send_splits, pair), _places(chunk.recv_splits, pair)
    count_R = torch.diff(rows.slot_offset_R, append=rows.slot_offset_R.new_tensor([rows.num_rows]))
    count_R = _spread(count_R, recv_R, ranks * pair)
    received = ExpertRows(recv_R[rows.source_N], rows.offset_L, rows.slot_N, count_R.cumsum(0) - count_R)
    return replace(
        chunk,
        rows=received.padded(most),
        weight_N=_longer(chunk.weight_N, most),
        send=_pad_sent(chunk.send, send_S, pair),
        received_R=_spread(chunk.received_R, recv_R, ranks * pair),
        send_splits=(pair,) * ranks,
        recv_splits=(pair,) * ranks,
    )


def _pad_sent(send: ExpertRows, place_S: Tensor, pair: int) -> ExpertRows:
    """Add rows behind those for each rank."""
    ranks = send.num_experts
    is_padding = torch.ones(ranks * pair, dtype=torch.bool)
    is_padding[place_S] = False
    padding = is_padding.nonzero().flatten()
    return ExpertRows(
        _spread(send.source_N, place_S, ranks * pair),
        torch.arange(1, ranks + 1, dtype=torch.int32) * pair,
        torch.cat((padding, place_S[send.slot_N])),
        send.slot_offset_R + padding.numel(),
    )


def _places(splits: tuple[int, ...], pair: int) -> Tensor:
    """Return where each row lies when every rank has `pair` rows: splits (1, 2) and pair 3 give [0, 3, 4]."""
    return torch.cat([torch.arange(rank * pair, rank * pair + count) for rank, count in enumerate(splits)])


def _spread(values: Tensor, places: Tensor, size: int) -> Tensor:
    spread = values.new_zeros(size)
    spread[places] = values
    return spread


def _longer(values: Tensor, size: int) -> Tensor:
    return torch.cat((values, values.new_zeros(size - values.numel())))
