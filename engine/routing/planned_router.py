"""The protocol of planned routers: choices that are a function of what the loader knows before the batch arrives.

A method is one file in engine/routing/planned/, or a user's own class, `moe.router=package.module:Class`
(examples/routers/ has one). It says two things: which row each token of a micro-batch has, and which set of experts
each row has at k (engine/routing/row_sets.py). The planner makes plans of that, and the layer, the exchange and the
certificate follow the plans; none of them knows the method.

Letters: P ranks of the expert group, T tokens of a rank (= B*Q, row-major), B streams, Q segment length, C ids left of
a segment (at least ngram - 1), E experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreroute.engine.config import MoEConfig, RouteWeights, Split
from foreroute.engine.errors import require
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.hashing import Purpose, hash64
from foreroute.engine.routing.method_options import Card
from foreroute.engine.routing.ngram_rows import KeyRows
from foreroute.engine.routing.plan import Plan, Route
from foreroute.engine.routing.plans.planner import Lookups, Planner
from foreroute.engine.routing.row_sets import Choice, RowSets

_THREADED = 1 << 22  # tokens times routers: above, planning takes 20 ms and more
_MOST_THREADS = 4
NO_EXPERT = 65535
"""In routes, in place of an expert: the token has no more."""
_KEPT = 2  # values of k whose row sets are kept: training's and, at a change of k, the one before


@dataclass(frozen=True, slots=True)
class Draw:
    """A forward pass and its tokens: with the seed all that a random choice may depend on, so every rank draws the
    same."""

    token_PT: NDArray[np.int64]
    """Numbers of the expert group's tokens within the step: stream x Q + place in the segment."""
    index: int  # of the step, or of the segment in an evaluation
    held_out: bool = False  # not training: other choices, the same at every evaluation
    number: int = 0  # of the pass over this micro-batch


@dataclass(frozen=True, slots=True)
class Places:
    """Where in a text the segments of an expert group's micro-batch begin."""

    split: Split
    first_PB: Tensor  # int64: the place of each segment's first id in the ids of the split; -1: the id before them


@dataclass(frozen=True, slots=True)
class BatchRoutes:
    """Routes that come with a micro-batch, of every rank of the expert group, of padding too."""

    expert_PTyK: NDArray[np.uint16]
    """Experts of each token in each of y layers, the most wanted first; NO_EXPERT after the last."""
    weight_PTyK: NDArray[np.float32] | None = None  # their weights


class GroupTokens:
    """The tokens of an expert group's micro-batch, and what all routers of a run make of them once."""

    def __init__(
        self,
        ids_PBQ: Tensor,
        left_PBC: Tensor,
        new_document_PBX: Tensor | None = None,
        draw: Draw | None = None,
        *,
        places: Places | None = None,
        real_PBQ: Tensor | None = None,
        routes: BatchRoutes | None = None,
    ) -> None:
        """Take the ids of the group.

        Args:
            ids_PBQ: int64, of every rank.
            left_PBC: int64, the true ids left of each segment.
            new_document_PBX: where in both documents begin (KeyRows.of).
            draw: what random choices depend on; None: there must be none.
            places: of the ids in a run's text; None: they are of none.
            real_PBQ: bool, false for padding, which has no expert; None: there is none.
            routes: of the tokens, where they come with the batch.
        """
        self.shape = ids_PBQ.shape[0], ids_PBQ[0].numel()
        marks = None if new_document_PBX is None else new_document_PBX.flatten(0, 1)
        self.draw, self.places, self.routes = draw, places, routes
        self.real_PT = None if real_PBQ is None else real_PBQ.reshape(self.shape).numpy()
        self._ids = ids_PBQ.flatten(0, 1), left_PBC.flatten(0, 1), marks
        self._keys: dict[tuple[int, ...], NDArray[np.integer[Any]]] = {}
        self._places: dict[tuple[int, ...], NDArray[np.int64]] = {}

    @property
    def ids(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The ids [P * B, Q], those left of them [P * B, C], and where in both documents begin, rank by rank."""
        return self._ids

    def keys(self, rows: KeyRows) -> NDArray[np.integer[Any]]:
        """Return the key [P, T] of each token, int32 where all keys fit."""
        kind = rows.ngram, rows.vocab_size
        if kind not in self._keys:
            dtype = np.int32 if rows.vocab_size**rows.ngram < 1 << 31 else np.int64
            self._keys[kind] = rows.keys(*self._ids).reshape(self.shape).astype(dtype, copy=False)
        return self._keys[kind]

    def shuffled_keys(self, rows: KeyRows) -> NDArray[np.integer[Any]]:
        """Return for each token the key of another one [P, T]; padding keeps its own."""
        draw = self.needed_draw
        numbers = rows.seed, draw.held_out, draw.index, draw.number
        if numbers not in self._places:
            hash_N = hash64(Purpose.shuffle, *numbers, draw.token_PT).reshape(-1)
            real_N = np.arange(hash_N.size) if self.real_PT is None else np.flatnonzero(self.real_PT)
            place_N = np.arange(hash_N.size)
            place_N[real_N] = real_N[hash_N[real_N].argsort(kind="stable")]
            self._places[numbers] = place_N
        return self.keys(rows).take(self._places[numbers]).reshape(self.shape)

    def token_places(self) -> tuple[Split, NDArray[np.int64]] | None:
        """Return of which split the tokens are, and each token's place in its ids [P, T]; None: of no split."""
        if self.places is None:
            return None
        first_PB = self.places.first_PB.numpy()
        segment = self.shape[1] // first_PB.shape[1]
        place_PBQ = first_PB[..., None] + np.arange(segment)
        return self.places.split, place_PBQ.reshape(self.shape)

    def at_pass(self, number: int) -> "GroupTokens":
        """Return the same tokens for another pass over them."""
        if self.draw is None or self.draw.number == number:
            return self
        other = GroupTokens.__new__(GroupTokens)
        other.__dict__.update(self.__dict__, draw=replace(self.draw, number=number))
        return other

    @property
    def needed_draw(self) -> Draw:
        """The draw; ValueError without one."""
        if self.draw is None:
            raise ValueError("experts or keys that are drawn need a draw")
        return self.draw


@dataclass(frozen=True, slots=True)
class RouterInputs:
    """All that planned routers may be made from, besides their options."""

    vocab_size: int
    seed: int  # of what is drawn
    number: int  # of routers: one for each expert layer, or one for all
    ids: NDArray[np.integer[Any]] | None = None
    """The training split as one stream; ids before its first count as 0. None: the routers' state is restored."""
    documents: NDArray[np.int64] | None = None  # ascending, where in the stream documents begin; None: one document
    cache_dir: Path | None = None  # folder of files that are safe to delete; None: no cache
    splits: Callable[[Split], NDArray[np.integer[Any]]] | None = None
    """Returns the ids of a split of the run's text, also of a restored one; None: there is no such text."""


class PlannedRouter(ABC):
    """A planned router of one layer, or of all layers."""

    card: ClassVar[Card]
    uses: ClassVar[tuple[str, ...]] = ()
    """Options of the section `moe` that it reads, besides those of all routers."""
    only_with: ClassVar[Mapping[str, tuple[str, Enum]]] = {
        "spread": ("weights", RouteWeights.table),
        **dict.fromkeys(("gate", "gate_normalised", "gate_scale"), ("weights", RouteWeights.live)),
    }
    """Those of them that it reads only if another option of the section has this value."""
    of_ids: ClassVar[bool] = True
    """Its choice depends on the ids alone, so a certificate counts it, and a sentence has one."""
    of_places: ClassVar[bool] = False
    """Its choice depends on the ids and their places in the run's text alone, so a certificate counts it."""
    needs_file: ClassVar[bool] = False
    """It cannot be built without a file that one of its options names."""
    at_most_k: ClassVar[bool] = False
    """No token has more than k experts; otherwise k is their mean, and one may have all."""
    passes: ClassVar[int] = 1
    """Forward passes over each training symbol."""

    def __init__(self, experts: int, *, columns: int | None = None) -> None:
        """Take the number of experts, and of columns with those without one."""
        self.experts, self.columns = experts, columns or experts
        self._planner = Planner(experts, columns=columns)

    @classmethod
    @abstractmethod
    def build(cls, moe: MoEConfig, inputs: RouterInputs) -> Sequence[Self]:
        """Make the routers of a run.

        Raises:
            UserError: an option is out of range, or needs another.
        """

    @classmethod
    def slices(cls, moe: MoEConfig) -> Sequence[int]:
        """Return of how many neighbouring moe.experts each expert consists, which are always active together with the
        same weight: parts of a wider one, with one output bias. All ones by default."""
        return [1] * moe.experts

    @abstractmethod
    def choose(self, tokens: GroupTokens, k: int) -> Choice:
        """Choose the experts of each token, k of them on average; also of padding, whose choice is dropped.

        The same RowSets object is looked up only once.
        """

    @abstractmethod
    def identity(self, *, weights: bool = True) -> Sequence[NDArray[Any]]:
        """Return all that choices depend on besides tokens and k; it is compared between ranks.

        Args:
            weights: with what the experts' weights alone depend on; a certificate leaves it out.
        """

    def refusal(self, split: Split, k: int) -> str | None:
        """Return why there are no routes of k experts for a split of the run's text, as a line; None: there are."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Return what belongs to the model and is saved with it; empty if it follows from the options."""
        return {}

    @classmethod
    def restore(cls, moe: MoEConfig, inputs: RouterInputs, states: Sequence[Mapping[str, Tensor]]) -> Sequence[Self]:
        """Make the routers again from what `state` returned of each; `inputs` has no training split."""
        return cls.build(moe, inputs)

    def place(self, mesh: Mesh) -> Self:
        """Plan for this rank of its expert group from now on."""
        self._planner = Planner(self.experts, columns=self.columns, rank=mesh.ep_rank, ranks=mesh.ep_size)
        return self

    def plan(self, tokens: GroupTokens, k: int, *, gather: bool = False, chunks: int = 1) -> Plan:
        """Plan a micro-batch for this rank; arguments as for Planner.plan."""
        return self._planner.plan(self._choose(tokens, k), k, gather=gather, chunks=chunks)

    def route(self, tokens: GroupTokens, k: int) -> Route:
        """Return the choice for each token of the group, rank by rank: what the plans of all ranks say together."""
        row_PT, sets = self._choose(tokens, k)
        sets = sets.of_rows(torch.from_numpy(np.ascontiguousarray(row_PT)).flatten())
        return Route(sets.order_rK.long(), sets.weights(), sets.used_rK)

    def _choose(self, tokens: GroupTokens, k: int) -> Choice:
        choice = self.choose(tokens, k)
        return choice if tokens.real_PT is None else choice.of_real(tokens.real_PT)


class TableRouter(PlannedRouter):
    """A planned router whose rows are those of a table, into which n-grams fall."""

    def __init__(self, experts: int, key_rows: KeyRows, *, columns: int | None = None) -> None:
        """Take the map from n-grams to rows; the numbers as for PlannedRouter."""
        super().__init__(experts, columns=columns)
        self.key_rows = key_rows
        self._sets: dict[int, RowSets] = {}

    @abstractmethod
    def row_sets(self, k: int) -> RowSets:
        """Return the sets of all rows at k."""

    def choose(self, tokens: GroupTokens, k: int) -> Choice:
        """Look up each token's row."""
        return Choice(self.key_rows.narrow(self.keys(tokens)), self.sets_at(k))

    def keys(self, tokens: GroupTokens) -> NDArray[np.integer[Any]]:
        """Return the key that each token looks up [P, T]: that of its n-gram."""
        return tokens.keys(self.key_rows)

    def sets_at(self, k: int) -> RowSets:
        """Return row_sets(k), made once for each k in use."""
        kept = self._sets  # replaced as a whole: several threads plan
        if k not in kept:
            last = list(kept.items())[1 - _KEPT :]
            kept = self._sets = {**dict(last), k: self.row_sets(k)}
        return kept[k]

    def lookups(self, k: int) -> Lookups:
        """Return what is worked out once for a k."""
        return self._planner.lookups(self.sets_at(k))


def check_use(routers: Sequence[PlannedRouter] | None, split: Split, k: int) -> None:
    """Check that a run's planned routers have routes of k experts for a split of its text.

    Raises:
        UserError: one has none.
    """
    for router in routers or ():
        line = router.refusal(split, k)
        require(line is None, line or "")


def plan_all(
    routers: Sequence[PlannedRouter], tokens: GroupTokens, k: int, *, gather: bool = False, chunks: int = 1
) -> tuple[Plan, ...]:
    """Plan a micro-batch with each of the routers; arguments as for Planner.plan.

    Several threads plan where there is enough to do: as many as PyTorch has, which launchers share out, up to
    _MOST_THREADS.
    """
    size = tokens.shape[0] * tokens.shape[1] * len(routers)
    threads = min(torch.get_num_threads(), _MOST_THREADS) if size >= _THREADED else 1

    def plan(router: PlannedRouter) -> Plan:
        return router.plan(tokens, k, gather=gather, chunks=chunks)

    if threads == 1:
        return tuple(map(plan, routers))
    first = plan(routers[0])  # makes the keys
    with ThreadPoolExecutor(threads) as pool:
        return first, *pool.map(plan, routers[1:])
