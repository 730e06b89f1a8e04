"""Makes the plans of batches for expert layers inside the user's model, in a thread of its own.

Every rank of an expert group plans the tokens of all its ranks, so their ids are exchanged between the hosts
(engine/plug_in/plan_inputs.py). The thread makes plans and exchanges in the order of the requests, which must be the
same on all ranks.

Letters: D width, T tokens of a rank, P ranks of the expert group.
"""

import contextlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from foreroute.engine.config import MoEConfig, ParallelConfig, Split
from foreroute.engine.data.device_copy import Delivery
from foreroute.engine.data.plan_agreement import tables_digest
from foreroute.engine.errors import RunFailed, UserError, require
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.parallel.cpu_group import CpuGroup, GlooGroup, expert_cpu_group
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.plug_in.plan_inputs import PlanInputs, check_places, checked_ids, left_of_part, plan_inputs, share
from foreroute.engine.plug_in.plans import Plans, Sequences
from foreroute.engine.routing.planned_router import Draw, PlannedRouter, RouterInputs, check_use, plan_all
from foreroute.engine.routing.plans.exchange_choice import use_gather, wire_dtype

_forks = 0
"""The number of forks between the process that imported this file and this process."""


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class BatchPlanner(ABC):
    """The planner of a model: its thread, its connections to other ranks, and the numbers of its plans.

    A copy (copy.deepcopy, pickle) has its own thread and connections. If experts are sharded, it connects to the other
    ranks at its first plan.
    """

    def __init__(
        self, layer: MoELayer, moe: MoEConfig, mesh: Mesh, parallel: ParallelConfig, inputs: RouterInputs
    ) -> None:
        """Connect the hosts of the expert group; a collective over all ranks.

        Args:
            layer: an expert layer of the model, which has its mode, device and number format.
            inputs: those of the routers, without the text.
        """
        self.moe, self.mesh, self.parallel = moe, mesh, parallel
        self.in_parts = False  # shard_sequences was called
        self._layer, self._inputs = layer, inputs
        self._draws = 0  # number of training plans up to the last that was used
        self._connections()
        self._cpu_group: CpuGroup | None = expert_cpu_group(mesh, self.timeout)

    def _connections(self) -> None:
        """Create the state that a copy does not share."""
        self._forks = _forks
        # makes all plans, in the order of the requests
        self._thread = ThreadPoolExecutor(1, "foreroute-planner")
        self._cpu_group = None
        self._part_group: CpuGroup | None = None
        # plans requested in training, and in evaluation since then
        self._requested, self._held_out = self._draws, 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, without threads, locks and connections."""
        names = "moe", "mesh", "parallel", "in_parts", "_layer", "_inputs", "_draws"
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy."""
        self.__dict__.update(state)
        self._connections()

    # For each kind of router.

    @property
    @abstractmethod
    def columns(self) -> int:
        """The number of experts."""

    @property
    @abstractmethod
    def tables(self) -> int:
        """A 64-bit digest of the tables; 0 without tables."""

    @abstractmethod
    def check_sequences(self, sequences: Sequences) -> None:
        """Raise UserError if the routers cannot use an argument of a plan."""

    @abstractmethod
    def make(self, shape: tuple[int, ...], inputs: PlanInputs, k: int, number: int, *, held_out: bool) -> Plans:
        """Return the plans of a batch.

        Args:
            shape: that of this rank's hidden states but for D.
            inputs: those of all ranks of the expert group.
            number: the number of this plan among those of training, or of an evaluation.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the planner's part of the state_dict of PlannedExperts: state that the model's does not hold."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the planner's part of the state_dict of PlannedExperts.

        Raises:
            UserError: the state is of another number of tables or experts.
        """

    def check_k(self, k: int) -> None:
        """Raise UserError if k is no number of active experts of these routers."""
        require(1 <= k <= self.columns, f"k={k}: must be in 1 .. {self.columns}, the number of experts")

    # For all routers.

    @property
    def timeout(self) -> timedelta:
        """How long a rank waits for others."""
        return timedelta(seconds=self.parallel.timeout_s)

    def shard_sequences(self, group: dist.ProcessGroup) -> None:
        """Take parts of sequences from now on; see PlannedExperts.shard_sequences.

        Raises:
            UserError: the group is of another backend than gloo.
        """
        backend = dist.get_backend(group)
        require(backend == "gloo", f"shard_sequences with a group of backend {backend}: must be gloo")
        self._part_group, self.in_parts = GlooGroup(group), True

    def submit(self, sequences: Sequences, k: int) -> Future[Plans]:
        """Begin to plan a batch; the plans, or the error, are the future's result.

        Raises:
            UserError: this is a forked process, such as a DataLoader's worker.
        """
        if _forks != self._forks:  # the thread belongs to the other process: its result would never come
            raise UserError(
                "planning in a forked process, such as a DataLoader's worker: must be in the training process;"
                " ahead(loader) plans in a thread of it"
            )
        training = self._layer.training
        with self._lock:
            number = self._requested if training else self._held_out
            self._requested, self._held_out = self._requested + training, 0 if training else number + 1
        return self._thread.submit(self._plan, sequences, k, number, held_out=not training)

    def used(self, plans: Plans) -> None:
        """Count plans that a forward pass uses: a copy and a resumed run number theirs from there."""
        with self._lock:
            self._draws = max(self._draws, plans.draws)

    def _plan(self, sequences: Sequences, k: int, number: int, *, held_out: bool) -> Plans:
        self.check_sequences(sequences)
        shape, inputs = self._group_inputs(sequences, k, number, held_out=held_out)
        return self.make(shape, inputs, k, number, held_out=held_out)

    def _group_inputs(
        self, sequences: Sequences, k: int, number: int, *, held_out: bool
    ) -> tuple[tuple[int, ...], PlanInputs]:
        """Return the shape of this rank's hidden states but for D, and the inputs of all ranks of the expert group."""
        ids, left = checked_ids(
            sequences, ngram=self.moe.ngram, vocab_size=self._inputs.vocab_size, ranks=self.mesh.ep_size
        )
        if self.in_parts:
            require(self._part_group is not None, "a copy of a model with parts of sequences: call shard_sequences")
            assert self._part_group is not None
            with self._together("the group of its sequences"):
                left = left_of_part(sequences, ids, self.moe.ngram - 1, self._part_group)
        shape = tuple(ids.shape[-2:])
        inputs = plan_inputs(sequences, ids, left)
        if ids.dim() == 2:
            cpu_group = self._cpu_group = self._cpu_group or self._reconnect()
            facts = {"k": k, "tables": self.tables, "evaluation": held_out, "plans": number}
            with self._together("its expert group"):
                inputs = share(inputs, cpu_group, facts, first_rank=self.mesh.ep_ranks.start)
        return shape[::-1] if sequences.sequence_first else shape, inputs

    @contextlib.contextmanager
    def _together(self, ranks: str) -> Iterator[None]:
        """Exchange something with other ranks inside."""
        try:
            yield
        except RunFailed:
            raise
        except RuntimeError as error:
            raise RunFailed(
                f"rank {self.mesh.rank} planned a forward pass, and not all ranks of {ranks} did so within"
                f" {self.timeout.total_seconds():g} s: all must run each forward pass, evaluation too"
                f" ({str(error).splitlines()[0]})"
            ) from error

    def _reconnect(self) -> CpuGroup:
        """Connect a copy to the other ranks of its expert group; a collective over all ranks."""
        mesh = self.mesh
        if mesh.ep_size > 1:
            place = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            require(
                place == (mesh.rank, mesh.world),
                f"copied on (rank, of ranks) = {mesh.rank, mesh.world}, which holds other experts: must be used there",
            )
        return expert_cpu_group(mesh, self.timeout)

    def _token_T(self, tokens: int, rank: int, device: torch.device | None = None) -> Tensor:
        """Return the numbers int64 [P*T] of the expert group's tokens among those of all ranks.

        Args:
            tokens: the largest number of tokens of a rank of the expert group (T).
            rank: that of this process.
        """
        first = (rank - self.mesh.ep_rank) * tokens
        return torch.arange(first, first + self.mesh.ep_size * tokens, device=device)


class RoutePlanner(BatchPlanner):
    """The planner of planned routers, which holds their tables."""

    def __init__(
        self,
        layer: MoELayer,
        routers: Sequence[PlannedRouter],
        moe: MoEConfig,
        mesh: Mesh,
        parallel: ParallelConfig,
        *,
        inputs: RouterInputs,
        width: int,
    ) -> None:
        """Set one router for all layers or one for each; the rest is as for BatchPlanner."""
        super().__init__(layer, moe, mesh, parallel, inputs)
        self._width = width
        self._use(routers)

    def _connections(self) -> None:
        super()._connections()
        self._delivery: Delivery | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy."""
        return {**super().__getstate__(), "_width": self._width, "routers": self._routers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy."""
        routers = state.pop("routers")
        super().__setstate__(state)
        self._use(routers)

    def _use(self, routers: Sequence[PlannedRouter]) -> None:
        self._routers = [router.place(self.mesh) for router in routers]
        self._tables = tables_digest(self._routers)

    @property
    def columns(self) -> int:
        """The number of experts."""
        return self._routers[0].columns

    @property
    def tables(self) -> int:
        """A 64-bit digest of the tables; equal tables have equal digests."""
        return self._tables

    def check_k(self, k: int) -> None:
        """Raise UserError if k is no number of active experts of these routers."""
        super().check_k(k)
        check_use(self._routers, Split.train, k)

    def check_sequences(self, sequences: Sequences) -> None:
        """Raise UserError if the routers cannot use an argument of a plan."""
        for name in ("routes", "places"):
            unused = getattr(sequences, name) is None or self._routers[0].of_places
            require(unused, f"{name}: must be None with moe.router={self.moe.router}; given takes them")
        if sequences.places is not None and isinstance(sequences.ids, Tensor):
            text = () if self._inputs.splits is None else self._inputs.splits(Split.train)
            check_places(sequences.places, sequences.ids.shape[-1], len(text))

    def make(self, shape: tuple[int, ...], inputs: PlanInputs, k: int, number: int, *, held_out: bool) -> Plans:
        """Return the plans of a batch, on the way to the layers' device."""
        mesh, parallel, weight = self.mesh, self.parallel, self._layer.experts.first_weight
        tokens = inputs.num_tokens
        gather = use_gather(
            parallel,
            experts=self.moe.experts,
            ranks=mesh.ep_size,
            k=k,
            tokens=tokens,
            width=self._width,
            itemsize=wire_dtype(parallel, weight.dtype).itemsize,
        )
        token_T = self._token_T(tokens, dist.get_rank() if dist.is_initialized() else 0)
        draw = Draw(token_T.view(mesh.ep_size, tokens).numpy(), number, held_out)
        plans = plan_all(self._routers, inputs.tokens(draw), k, gather=gather, chunks=parallel.chunks)
        if self._delivery is None or self._delivery.device != weight.device:
            self._delivery = Delivery(weight.device)
        (plans, token_T), copied = self._delivery.send((plans, token_T))
        return Plans(k, shape, self._tables, plans, token_T, copied, 0 if held_out else number + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the tables, and the number of training plans up to the last that was used."""
        return {"draws": self._draws, "tables": [router.state() for router in self._routers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the planner's part of the state_dict of PlannedExperts.

        Raises:
            UserError: the number of tables or experts differs.
        """
        seed, passes = state["dropout"]
        routers = type(self._routers[0]).restore(self.moe, replace(self._inputs, seed=seed), state["tables"])
        shape = len(routers), routers[0].columns
        here = len(self._routers), self.columns
        require(shape == here, f"saved with (tables, experts) = {shape}: must be {here} as here")
        self._use(routers)
        self._draws = self._requested = state.get("draws", passes)
