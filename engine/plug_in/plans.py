"""The plans for the user's model and the ids from which they are made; engine/plug_in/planned_experts.py makes them.

A token's routing depends on its n-gram: its own id and the ids left of it in the same text. Padding and other documents
must not be part of it. At the start of a text the missing ids count as 0.

Letters: B sequences, Q ids of each, C = ngram - 1 ids left of them.
"""

from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor

from foreroute.engine.errors import require
from foreroute.engine.routing.plan import Plan


@dataclass(frozen=True, slots=True)
class Plans:
    """The routing of one batch in every replaced layer, for one forward pass."""

    k: int  # active experts
    shape: tuple[int, ...]  # B, Q; or Q, B for hidden states [Q, B, D]
    tables: int  # digest of the tables
    plans: tuple[Plan, ...] | None  # one for all layers, or one for each; None for live routers
    token_T: Tensor  # int64: numbers of the expert group's tokens among those of all ranks
    copied: torch.cuda.Event | None  # the end of the copy to a GPU
    draws: int = 0  # number of training plans up to this one; 0 in evaluation
    used: set[int] = field(default_factory=set)  # layers that have run with it
    real_T: Tensor | None = None
    """bool, of this rank's tokens: false for padding, for live routers; None: there is none."""


class Context(TypedDict, total=False):
    """The keywords of PlannedExperts.plan and planned, of which Sequences says the shapes."""

    mask: Tensor | None
    documents: Tensor | None
    routes: Tensor | None
    route_weights: Tensor | None
    places: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Ids and the context that determines their n-grams, and where their routes come from elsewhere, these.

    Shapes may be [P, B, ..], of all ranks of the expert group, in place of [B, ..].
    """

    ids: Tensor  # int [B, Q]
    left: Tensor | None = None  # int [B, C]: the ids left of each sequence; None: the start of a text
    mask: Tensor | None = None  # [B, Q]: 0 for padding, left or right of a sequence
    documents: Tensor | None = None  # int [B, Q]: a change of number begins a text
    sequence_first: bool = False  # hidden states are [Q, B, D]
    routes: Tensor | None = None  # int [B, Q, y, K]: experts in each of y layers, -1 after the last; of router given
    route_weights: Tensor | None = None  # float [B, Q, y, K]: their weights
    places: Tensor | None = None  # int [B]: the place of each sequence's first id in text_ids; of router given


def keep_to_texts(sequences: Sequences, ids: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids [.., B, Q] and left context [.., B, C] such that each n-gram has only ids of its own text.

    With documents or sequence_first each id becomes a sequence: ids [.., B*Q, 1] and left context [.., B*Q, C].

    Args:
        ids, left: those of `sequences`, checked, int64 on the host.

    Example: ids [[3, 4, 5]], documents [[0, 1, 1]], left [[9]] become ids [[3], [4], [5]] and left [[9], [0], [4]].

    Raises:
        UserError: mask or documents have a wrong shape, or padding is within a sequence or directly after left context.
    """
    check_shapes(sequences, ids)
    if not ids.numel():
        return ids, left
    if sequences.mask is not None:
        ids = _without_padding(ids, left, sequences.mask.cpu() != 0)
    if sequences.documents is None and not sequences.sequence_first:
        return ids, left
    documents = ids.new_zeros(ids.shape)
    if sequences.documents is not None:
        documents = sequences.documents.cpu().long()
    window, alike = _windows(ids, left, documents)
    window = window * alike
    if sequences.sequence_first:
        window = window.transpose(-2, -3)
    window = window.flatten(-3, -2)
    return window[..., -1:].contiguous(), window[..., :-1].contiguous()


def check_shapes(sequences: Sequences, ids: Tensor) -> None:
    """Check that mask and documents are as ids.

    Raises:
        UserError: one has another shape.
    """
    for name in ("mask", "documents"):
        value = getattr(sequences, name)
        require(
            value is None or value.shape == ids.shape,
            f"{name} of shape {value is not None and list(value.shape)}: must be {list(ids.shape)} as ids",
        )


def in_order(sequences: Sequences, value: Tensor, dims: int = 0) -> Tensor:
    """Return a value of each token [.., B, Q, *] as [.., T, *], in the order of the hidden states.

    Args:
        dims: number of dimensions after Q.
    """
    at = value.dim() - dims
    if sequences.sequence_first:
        value = value.transpose(at - 1, at - 2)
    return value.flatten(at - 2, at - 1)


def _without_padding(ids: Tensor, left: Tensor, real: Tensor) -> Tensor:
    starts = (real[..., 1:] & ~real[..., :-1]).sum(-1) + real[..., 0]
    require(
        bool((starts <= 1).all()), "mask: has padding between the ids of a sequence; must have it left or right of them"
    )
    separated = left.any(-1) & ~real[..., 0] & real.any(-1)
    require(
        not bool(separated.any()),
        "mask: has padding between left context and the ids of a sequence; left must be 0 there",
    )
    return ids * real


def _windows(ids: Tensor, left: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """Return each id's n-gram [.., B, Q, C + 1], and a mask of its ids in the same document as the id.

    Left context belongs to the first document.
    """
    size = left.shape[-1] + 1
    changes = torch.zeros_like(documents)
    changes[..., 1:] = documents[..., 1:] != documents[..., :-1]
    run = torch.cat((torch.zeros_like(left), changes.cumsum(-1)), dim=-1).unfold(-1, size, 1)
    stream = torch.cat((left, ids), dim=-1).unfold(-1, size, 1)
    return stream, run == run[..., -1:]
