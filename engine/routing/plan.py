"""The plan: everything a layer needs to know about routing, computed before the layer runs.

For planned routers engine/routing/plans/planner.py makes it in the data loader, from the token ids of all ranks of the
expert group. A live router's Route becomes a plan inside the forward pass: `build_plan` on one rank, where every token
stays and the received rows are the local tokens; engine/routing/plans/live_plan.py on several. After that all share
engine/moe/layer.py.

A plan has one chunk, or several that are exchanged one behind the other (engine/moe/overlap.py). A chunk is about a
contiguous share of every rank's tokens, so a token is in one chunk and the rows that travel are the same in number.

Letters: T local tokens, K active experts, N expert rows (T*K on one rank), E experts, S sent and R received rows, P
ranks of the expert group.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from foreroute.engine.routing.plans.row_plan import RowsPlan
from foreroute.kernels.dropout import seed_words
from foreroute.kernels.expert_index import ExpertRows, expert_rows


class Route(NamedTuple):
    """A router's choice for each token, in order of preference."""

    expert_TK: Tensor  # int64: global expert ids, distinct within a token
    weight_TK: Tensor  # fp32: mixing weights
    used_TK: Tensor | None = None  # bool: which of them the token uses; None: all
    rows: int | None = None  # how many of them all tokens use, where that is known by construction
    even: bool = False  # equally many of `rows` are of each expert, and so on all ranks


@dataclass(frozen=True, slots=True)
class SetRows:
    """The whole set of each received row, from which a gate makes the weights of this rank's experts."""

    expert_RK: Tensor  # int64: global expert ids, and columns without experts
    used_RK: Tensor | None  # bool: which of them the row uses; None: all
    place_N: Tensor | None
    """int64: each expert row's place in the flattened [R, K]; None: rows are local tokens, for columns without
    experts."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where rows go and what each expert reads, for a share of every rank's tokens."""

    rows: ExpertRows  # expert-major rows over the received rows
    weight_N: Tensor | None  # fp32: mixing weight of each expert row; None: a gate makes it from `sets`
    send: ExpertRows | None
    """Rows to send, rank by rank: "experts" are ranks, source_N the tokens of this chunk; None: all of them to all
    ranks."""
    received_R: Tensor | None
    """int64: which of the group's tokens, rank by rank, each received row is; None: all, in order."""
    send_splits: tuple[int, ...]  # rows to each rank of the expert group, this one included
    recv_splits: tuple[int, ...]  # rows from each rank of the expert group
    sets: SetRows | None = None

    @property
    def num_tokens(self) -> int:
        """Local tokens of this chunk."""
        return self.send_splits[0] if self.send is None else self.send.num_inputs


@dataclass(frozen=True, slots=True)
class Plan:
    """The routing of one router and one micro-batch on this rank."""

    k: int  # active experts per token; for routers with a number for each token their mean, as asked for
    rank: int  # this rank's number in its expert group
    count_E: Tensor  # int64: rows of every expert over the expert group
    chunks: tuple[Chunk, ...]  # in the order of the tokens
    column_weight_TJ: Tensor | None = None
    """fp32: weights of the local tokens' experts that need no row (engine/moe/zero_experts.py)."""
    own_sets: SetRows | None = None
    """The sets of the local tokens, from which a gate makes those weights instead."""

    @property
    def num_tokens(self) -> int:
        """Local tokens T."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def send_splits(self) -> tuple[int, ...]:
        """Rows to each rank of the expert group, this one included."""
        return _sums([chunk.send_splits for chunk in self.chunks])

    @property
    def recv_splits(self) -> tuple[int, ...]:
        """Rows from each rank of the expert group."""
        return _sums([chunk.recv_splits for chunk in self.chunks])

    @property
    def wire_rows(self) -> int:
        """Rows that leave this rank on their way to experts."""
        return sum(self.send_splits) - self.send_splits[self.rank]

    def wire_bytes(self, width: int, itemsize: int) -> int:
        """Bytes of rows that leave this rank in one layer's forward pass; its backward pass sends as many.

        Rows go to experts, and results of as many rows as came go back; in backward the gradients of either. A live
        router's counts and weights are not in it, nor is what recomputation repeats.

        Args:
            width: numbers in a row (D).
            itemsize: bytes of a number on the wire.
        """
        results = sum(self.recv_splits) - self.recv_splits[self.rank]
        return (self.wire_rows + results) * width * itemsize


@dataclass(frozen=True, slots=True)
class Routing:
    """All that was planned ahead of one forward pass, from the loader down to the layers; a dense model ignores it."""

    k: int  # active experts
    plans: tuple[Plan, ...] | None = None
    """One for all layers, or one for each that has a planned router; None: all have live ones."""
    token_T: Tensor | None = None
    """int64: global numbers of the tokens of the expert group, rank by rank, for the experts' stateless dropout; None
    counts from 0."""
    dropout_seed: int | Tensor = 0  # of (run, step); or the words of each layer's own seed (layer_seeds)
    position_BQ: Tensor | None = None
    """int32: ids of the same document before each id, where attention and memory stop at document starts; None: they do
    not."""
    tail_tokens: tuple[Tensor, ...] = ()
    """int64: for each tail of an adaptive softmax (engine/model/adaptive.py) the tokens whose targets it has."""
    real_T: Tensor | None = None
    """bool: false for padding, which live routers leave without experts; planned routers' plans have none of it. None:
    there is none."""
    row_plans: tuple[RowsPlan, ...] = ()
    """Of each n-gram table that ranks share, the rows of the step that begins with this pass; empty: they have landed
    before."""
    landed_BQH: tuple[Tensor, ...] = ()  # int64: as TableRows.landed_BQH, the table at the input last
    second: "Routing | None" = None  # of a second pass over the batch; None: there is one pass

    @property
    def all_plans(self) -> tuple[Plan, ...]:
        """The plans of all passes."""
        return (self.plans or ()) + (self.second.all_plans if self.second is not None else ())

    def plan_of(self, number: int) -> Plan | None:
        """Return the plan of a planned router, by its number among those of all layers; None: there are none."""
        if self.plans is None:
            return None
        return self.plans[number % len(self.plans)]

    def seed_of(self, layer: int) -> int | Tensor:
        """Return the seed of a layer's dropout, as kernels.Dropout takes it."""
        seed = self.dropout_seed
        return seed.select(0, layer) if isinstance(seed, Tensor) else _layer_seed(seed, layer)


def layer_seeds(seed: int, layers: int) -> Tensor:
    """Return the words of each layer's dropout seed, int32 [layers, 2] (kernels.dropout.seed_words).

    They travel with the plans, so the step sends nothing to the device, and a CUDA graph reads them at each replay.
    """
    return torch.tensor([seed_words(_layer_seed(seed, layer)) for layer in range(layers)], dtype=torch.int32)


def _layer_seed(seed: int, layer: int) -> int:
    return seed * 1_000_003 + layer


def _sums(splits: list[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip(*splits, strict=True))


def cut(num_tokens: int, chunks: int) -> list[slice]:
    """Cut tokens into contiguous chunks as equal as can be: `chunks` of them, or one each where tokens are fewer.

    Example: 7 tokens in 3 chunks are 0 and 1, 2 and 3, 4 to 6.
    """
    count = max(1, min(chunks, num_tokens))
    ends = [num_tokens * i // count for i in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def build_plan(route: Route, num_experts: int, k: int | None = None) -> Plan:
    """Turn a route into the plan of a one-rank expert group.

    weight_N stays connected to route.weight_TK for autograd, so that live routers learn through it.

    Args:
        k: of the plan; None: the experts that the route lists of each token.

    Example: two tokens, K=2, experts 0..2. Token 0 takes expert 2 (0.7) then 0 (0.3), token 1 takes 0 (0.6) then 1:

        source_N = [0, 1, 1, 0], offset_L = [2, 3, 4], weight_N = [0.3, 0.6, 0.4, 0.7], count_E = [2, 1, 1]
    """
    num_tokens, listed = route.expert_TK.shape
    if route.used_TK is None:
        rows, choice_N = expert_rows(route.expert_TK, num_experts)
        weight_N = route.weight_TK.reshape(-1)[choice_N]
    else:
        chosen_TE = chosen_mask(route, num_experts)
        count = int(chosen_TE.sum()) if route.rows is None else route.rows
        rows, place_N = rows_of_mask(chosen_TE, count)
        weight_N = dense_weights(route, num_experts).T.reshape(-1)[place_N]
    count_E = torch.diff(rows.offset_L.long(), prepend=rows.offset_L.new_zeros(1).long())
    chunk = Chunk(
        rows=rows, weight_N=weight_N, send=None, received_R=None, send_splits=(num_tokens,), recv_splits=(num_tokens,)
    )
    return Plan(k or listed, 0, count_E, (chunk,))


def chosen_mask(route: Route, num_experts: int) -> Tensor:
    """Return which experts each token uses, bool [T, E]."""
    used_TK = torch.ones_like(route.expert_TK) if route.used_TK is None else route.used_TK.long()
    count_TE = used_TK.new_zeros(used_TK.shape[0], num_experts).scatter_add(1, route.expert_TK, used_TK)
    return count_TE > 0


def dense_weights(route: Route, num_experts: int) -> Tensor:
    """Return each token's weight of every expert [T, E], connected to route.weight_TK; 0 where it is not used."""
    weight_TK = route.weight_TK
    if route.used_TK is not None:
        weight_TK = weight_TK.masked_fill(~route.used_TK, 0.0)
    return weight_TK.new_zeros(weight_TK.shape[0], num_experts).scatter_add(1, route.expert_TK, weight_TK)


def rows_of_mask(mask_RL: Tensor, count: int) -> tuple[ExpertRows, Tensor]:
    """List the `count` pairs of a row and something it uses, an expert or a rank.

    Returns:
        The rows, and place_N: each pair's place in the flattened transposed mask.

    Example: [[1, 0], [1, 1]]: source = [0, 1, 1], offset = [2, 3], slot = [0, 1, 2], slot_offset = [0, 1] and
    place = [0, 1, 3].
    """
    number_LR = (mask_RL.T.reshape(-1).cumsum(0) - 1).view(mask_RL.T.shape)
    place_N = true_places(mask_RL.T, count)
    count_R = mask_RL.sum(dim=1)
    rows = ExpertRows(
        source_N=place_N % max(mask_RL.shape[0], 1),
        offset_L=mask_RL.sum(dim=0).cumsum(0).to(torch.int32),
        slot_N=number_LR.T.reshape(-1)[true_places(mask_RL, count)],
        slot_offset_R=count_R.cumsum(0) - count_R,
    )
    return rows, place_N


def true_places(mask: Tensor, count: int) -> Tensor:
    """Return the places of the `count` true values of a flattened mask; the host need not wait to know how many."""
    return torch.nonzero_static(mask.reshape(-1), size=count).squeeze(1)
