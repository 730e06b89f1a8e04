"""The inputs of a batch's plans: those of this rank on the host, and those of the whole expert group.

Every rank of an expert group plans the tokens of all its ranks, so their ids are exchanged between the hosts. Ranks may
have unequal numbers of tokens, as dynamic padding gives: each plans for as many as the largest number, and what a rank
lacks is padding, without an expert.

Letters: P ranks of the expert group, S sequences of X ids (or T sequences of one id), C ids left of them, T tokens of a
rank, y layers, K experts listed of a token.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.config import Split
from foreroute.engine.errors import RunFailed, require
from foreroute.engine.parallel.cpu_group import CpuGroup, odd_ones
from foreroute.engine.plug_in.call_arguments import kind_of
from foreroute.engine.plug_in.plans import Sequences, check_shapes, in_order, keep_to_texts
from foreroute.engine.routing.planned_router import NO_EXPERT, BatchRoutes, Draw, GroupTokens, Places

_PADDING = -1  # in place of an id


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """The inputs of one rank, or with a first dimension P of all ranks of the expert group."""

    id_SX: Tensor  # int64; _PADDING for padding
    left_SC: Tensor  # int64
    place_T: Tensor | None  # int64: the place of each token in the text of the run
    route_TyK: Tensor | None  # int16: uint16 of BatchRoutes
    weight_TyK: Tensor | None  # fp32: their weights

    @property
    def num_tokens(self) -> int:
        """Tokens of a rank (T)."""
        return self.id_SX.shape[-2] * self.id_SX.shape[-1]

    @property
    def real_SX(self) -> Tensor:
        """Which ids are no padding, bool."""
        return self.id_SX != _PADDING

    def items(self) -> list[tuple[str, Tensor]]:
        """List what there is."""
        found = [(one.name, getattr(self, one.name)) for one in fields(self)]
        return [(name, value) for name, value in found if value is not None]

    def tokens(self, draw: Draw) -> GroupTokens:
        """Return them as routers read them; only those of a group."""
        real = self.real_SX
        routes = None
        if self.route_TyK is not None:
            weights = None if self.weight_TyK is None else self.weight_TyK.numpy()
            routes = BatchRoutes(self.route_TyK.numpy().view(np.uint16), weights)
        return GroupTokens(
            self.id_SX.clamp(min=0),
            self.left_SC.clamp(min=0),
            draw=draw,
            places=None if self.place_T is None else Places(Split.train, self.place_T),
            real_PBQ=None if real.all() else real,
            routes=routes,
        )


def checked_ids(sequences: Sequences, *, ngram: int, vocab_size: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Return ids and left context as int64 on the host; the latter zeros if there is none.

    Raises:
        UserError: an id is not in the vocabulary, or one of them has a wrong shape.
    """
    ids, left = sequences.ids, sequences.left
    for name, given in (("ids", ids), ("left", ids if left is None else left)):
        require(isinstance(given, Tensor), f"{name} is {kind_of(given)}: must be a tensor of ids")
    require(
        ids.dim() == 2 or (ids.dim() == 3 and ids.shape[0] == ranks),
        f"ids of shape {list(ids.shape)}: must be [sequences, length] or, of all ranks of the expert group, "
        f"[{ranks}, sequences, length]",
    )
    shape = (*ids.shape[:-1], ngram - 1)
    left = ids.new_zeros(shape) if left is None else left
    require(left.shape == shape, f"left of shape {list(left.shape)}: must be {list(shape)}, as moe.ngram={ngram}")
    for name, values in (("ids", ids), ("left", left)):
        low, high = (int(x) for x in values.aminmax()) if values.numel() else (0, 0)
        require(
            not values.is_floating_point() and low >= 0 and high < vocab_size,
            f"{name} from {low} to {high}, {values.dtype}: must be whole numbers in 0 .. {vocab_size - 1},"
            " the vocabulary",
        )
    return ids.cpu().long(), left.cpu().long()


def check_places(places: Tensor, length: int, text_length: int) -> None:
    """Check that sequences of so many ids at these places are in a text of so many ids.

    Raises:
        UserError: one is not.
    """
    low, high = (int(x) for x in places.aminmax()) if places.numel() else (0, 0)
    require(
        not places.is_floating_point() and low >= -1 and high + length <= text_length,
        f"places from {low} to {high}, of {length} ids each: must be in the text of {text_length} ids",
    )


def left_of_part(sequences: Sequences, ids_BQ: Tensor, context: int, group: CpuGroup) -> Tensor:
    """Return the left context [B, C] of parts of sequences, from the ranks that hold the parts left of them.

    Ids of another document, and those before padding, are 0. One exchange of sizes and one of [B, C, 2] numbers.

    Args:
        group: the ranks with the parts of the same sequences, from left to right; the parts may be unequal in length.

    Raises:
        UserError: left context is given, or an argument has a wrong shape.
        RunFailed: the ranks differ in their number of sequences.
    """
    require(
        sequences.left is None and ids_BQ.dim() == 2, "parts of sequences: take ids [B, Q] of this rank, and no left"
    )
    check_shapes(sequences, ids_BQ)
    rows, length = ids_BQ.shape
    last = min(context, length)
    found = group.all_gather(np.array([rows, last]))
    rows_P, last_P = found[:, 0].tolist(), found[:, 1].tolist()
    if len(set(rows_P)) > 1:
        raise RunFailed(f"the parts of a sequence differ in their number of sequences: {rows_P}, from left to right")
    real_BQ = torch.ones_like(ids_BQ) if sequences.mask is None else (sequences.mask.cpu() != 0).long()
    document_BQ = torch.zeros_like(ids_BQ) if sequences.documents is None else sequences.documents.cpu().long()
    both_BQ2 = torch.stack((ids_BQ.where(real_BQ > 0, _PADDING), document_BQ), dim=-1)
    own_BC2 = torch.full((rows, context, 2), _PADDING)
    own_BC2[:, context - last :] = both_BQ2[:, length - last :]
    parts = torch.from_numpy(group.all_gather(own_BC2.numpy()))
    left = [part[:, context - size :] for part, size in zip(parts[: group.rank], last_P, strict=False)]
    whole = torch.cat((torch.full_like(own_BC2, _PADDING), *left, both_BQ2[:, :1]), dim=1)
    # up to the first id of this part; whatever is beyond another text is not of its text
    whole = whole[:, whole.shape[1] - context - min(length, 1) :]
    if not length:
        return torch.zeros(rows, context, dtype=torch.int64)
    id_BX, document_BX = whole.unbind(-1)
    inside_BC = (document_BX[:, :-1] == document_BX[:, 1:]) & (id_BX[:, :-1] >= 0) & (id_BX[:, 1:] >= 0)
    inside_BC = inside_BC.flip(1).long().cumprod(1).flip(1)
    return id_BX[:, :-1] * inside_BC


def plan_inputs(sequences: Sequences, ids: Tensor, left: Tensor) -> PlanInputs:
    """Return the inputs of this rank, or of the group where the sequences are of all its ranks.

    Args:
        ids, left: those of `sequences`, checked, int64 on the host.

    Raises:
        UserError: an argument has a wrong shape.
    """
    shape = tuple(ids.shape)
    kept_ids, left = keep_to_texts(sequences, ids, left)
    real_T = torch.ones((*shape[:-2], shape[-2] * shape[-1]), dtype=torch.bool)
    if sequences.mask is not None:
        real_T = in_order(sequences, sequences.mask.cpu() != 0)
        kept_ids = kept_ids.masked_fill(~real_T.view(kept_ids.shape), _PADDING)
    place_T = route_TyK = weight_TyK = None
    if sequences.places is not None:
        fits = sequences.places.shape == shape[:-1]
        require(fits, f"places of shape {list(sequences.places.shape)}: must be {list(shape[:-1])}, of each sequence")
        place_T = in_order(sequences, sequences.places.cpu().long()[..., None] + torch.arange(shape[-1]))
    if sequences.routes is not None:
        route_TyK = _routes(sequences, real_T)
    if sequences.route_weights is not None:
        given = sequences.routes is not None and sequences.route_weights.shape == sequences.routes.shape
        require(given, f"route_weights of shape {list(sequences.route_weights.shape)}: must be that of routes")
        weight_TyK = in_order(sequences, sequences.route_weights.cpu().float(), 2)
    return PlanInputs(kept_ids, left, place_T, route_TyK, weight_TyK)


def _routes(sequences: Sequences, real_T: Tensor) -> Tensor:
    """Return the routes as uint16 in int16; padding has none."""
    found = sequences.routes
    assert found is not None
    shape = sequences.ids.shape
    require(
        found.dim() == len(shape) + 2 and found.shape[: len(shape)] == shape and not found.is_floating_point(),
        f"routes of shape {list(found.shape)}, {found.dtype}: must be whole numbers"
        f" [{', '.join(map(str, shape))}, layers, experts of a token]",
    )
    route_TyK = in_order(sequences, found.cpu().long(), 2)
    low, high = (int(x) for x in route_TyK.aminmax()) if route_TyK.numel() else (0, 0)
    require(
        low >= -1 and high <= NO_EXPERT,
        f"routes from {low} to {high}: must be numbers of experts, and -1 after a token's last one",
    )
    route_TyK = route_TyK.where(real_T[..., None, None] & (route_TyK >= 0), NO_EXPERT)
    return torch.from_numpy(route_TyK.numpy().astype(np.uint16).view(np.int16))


def share(own: PlanInputs, group: CpuGroup, facts: dict[str, int], *, first_rank: int) -> PlanInputs:
    """Gather the inputs of all ranks of the expert group: first sizes, then [S, C + X] numbers of 4 bytes, and routes.

    If ranks differ in S or X, each token becomes a sequence, and all have as many as the largest number.

    Args:
        facts: numbers in which the ranks must agree, by name.
        first_rank: rank of the group's first member, for messages.

    Raises:
        RunFailed: the ranks differ in a fact, or one has routes or places and another does not.
        RuntimeError: not all ranks called it in time.
    """
    extra = {
        "places": int(own.place_T is not None),
        "routes' layers": 0 if own.route_TyK is None else own.route_TyK.shape[1],
        "routes' experts": 0 if own.route_TyK is None else own.route_TyK.shape[2],
        "routes' weights": int(own.weight_TyK is not None),
    }
    facts = {**facts, **extra}
    found = group.all_gather(np.array([*own.id_SX.shape, *facts.values()], np.int64))
    shapes, values = found[:, :2].tolist(), found[:, 2:]
    for name, value_P in zip(facts, values.T.tolist(), strict=True):
        if len(set(value_P)) > 1:
            odd = odd_ones(value_P, first=first_rank)
            raise RunFailed(f"the ranks of an expert group differ in their {name}: {odd}")
    tokens = max(sequences * length for sequences, length in shapes)
    ids, left = _share_ids(own, group, shapes, tokens)
    rest = {name: _share_padded(value, group, tokens) for name, value in own.items()[2:]}
    return replace(own, id_SX=ids, left_SC=left, **rest)


def _share_ids(own: PlanInputs, group: CpuGroup, shapes: list[list[int]], tokens: int) -> tuple[Tensor, Tensor]:
    context = own.left_SC.shape[1]
    stream = torch.cat((own.left_SC, own.id_SX), dim=1).to(torch.int32)
    if all(shape == shapes[0] for shape in shapes):
        both_PSX = torch.from_numpy(group.all_gather(stream.numpy())).long()
        return both_PSX[..., context:].contiguous(), both_PSX[..., :context].contiguous()
    sizes = [sequences * (context + length) for sequences, length in shapes]
    flat = np.zeros(max(sizes), np.int32)
    flat[: stream.numel()] = stream.numpy().reshape(-1)
    window_PTW = torch.zeros(len(shapes), tokens, context + 1, dtype=torch.int64)
    window_PTW[..., -1] = _PADDING
    for rank, row in enumerate(group.all_gather(flat)):
        sequences, length = shapes[rank]
        whole = torch.from_numpy(row[: sizes[rank]].astype(np.int64)).view(sequences, context + length)
        if length:
            window_PTW[rank, : sequences * length] = whole.unfold(1, context + 1, 1).flatten(0, 1)
    return window_PTW[..., -1:].contiguous(), window_PTW[..., :-1].contiguous()


def _share_padded(value: Tensor, group: CpuGroup, tokens: int) -> Tensor:
    """Gather values of tokens [T, *]; those that a rank lacks are -1, in routes NO_EXPERT."""
    padded = value.new_full((tokens, *value.shape[1:]), -1)
    padded[: len(value)] = value
    plain: NDArray[Any] = padded.numpy()
    return torch.from_numpy(group.all_gather(plain.view(np.uint8)).view(plain.dtype))
