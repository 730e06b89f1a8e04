"""The plans for expert layers inside the user's model; engine/plug_in/replace.py inserts the layers.

A layer (engine/plug_in/planned_layer.py) receives hidden states only, and the model around it has no plans. So
PlannedExperts holds the plans of the forward passes in progress, and each layer gets its plan from it. A plan is for
one forward pass: a layer that would use another pass's plan raises.

Letters: B sequences, Q ids of each, C = ngram - 1 ids left of them, D width, T = B*Q tokens, P ranks of the expert
group.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn
from torch import distributed as dist

from foreroute.engine.config import MoEConfig, ParallelConfig, Split
from foreroute.engine.data.device_copy import Delivery, receive
from foreroute.engine.data.plan_agreement import tables_digest
from foreroute.engine.errors import RunFailed, UserError, require
from foreroute.engine.moe.exchange import build_exchange
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.optim.expert_sharding import expert_group_comm
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.cpu_group import CpuGroup, GlooGroup, expert_cpu_group
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.plug_in.attached import (
    After,
    Attachment,
    Before,
    Call,
    CallArguments,
    Layout,
    Place,
    generated_ids,
    kind_of,
)
from foreroute.engine.plug_in.passes import Pass, Passes, backward_node
from foreroute.engine.plug_in.plan_inputs import PlanInputs, check_places, checked_ids, left_of_part, plan_inputs, share
from foreroute.engine.plug_in.plans import Context, Plans, Sequences
from foreroute.engine.plug_in.replaceable import Replaced, side_of
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.planned_router import Draw, PlannedRouter, RouterInputs, check_use, plan_all
from foreroute.engine.routing.plans.exchange_choice import use_gather, wire_dtype

Batch = TypeVar("Batch", bound=Sequence[Any] | Mapping[Any, Any])


_forks = 0
"""The number of forks between the process that imported this file and this process."""


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


class PlannedExperts:
    """The expert layers of a model, their tables, and the plans of the current pass; made by replace_feed_forwards.

    A copy of the model (copy.deepcopy, pickle, torch.save, AveragedModel) has its own, with the same tables, k and
    number of passes, and without plans: engine.plug_in.experts_of returns it. If experts are sharded, it connects to
    the other ranks at its first plan, so every rank of the run must plan with its copy.
    """

    comm: ExpertGroupComm | None = None
    """The communicator of the expert group, with counts and times; None before the first pass and on one rank."""

    replaced: tuple[Replaced, ...] = ()
    """The replaced modules, layer by layer."""
    _cpu_group: CpuGroup | None

    def __init__(
        self,
        layers: Sequence[MoELayer],
        routers: Sequence[PlannedRouter],
        moe: MoEConfig,
        mesh: Mesh,
        parallel: ParallelConfig,
        *,
        inputs: RouterInputs,
        width: int,
        k: int,
    ) -> None:
        """Set the layers, numbered from 0, and one router for all or one for each; a collective over all ranks.

        Args:
            inputs: those of the routers, without the text.
        """
        self.layers, self._mesh, self._parallel = layers, mesh, parallel
        self._moe, self._inputs, self._width, self._seed = moe, inputs, width, inputs.seed
        self._use(routers)
        self.k = k
        self._passes = 0  # number of passes begun
        self._in_parts = False  # shard_sequences was called
        self._draws = 0  # number of training plans up to the last that was used
        self._connections()
        self._cpu_group = expert_cpu_group(mesh, self.timeout)

    def _connections(self) -> None:
        """Create the state that a copy does not share."""
        self._forks = _forks
        # makes all plans, in the order of the requests
        self._thread = ThreadPoolExecutor(1, "foreroute-planner")
        self._cpu_group = None
        self._part_group: CpuGroup | None = None
        # plans requested in training, and in evaluation since then
        self._requested, self._held_out = self._draws, 0
        self._delivery: Delivery | None = None
        self.passes = Passes()
        self._lock = threading.Lock()
        self.comm = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, without threads, locks, connections and plans."""
        names = "layers", "replaced", "_mesh", "_parallel", "_moe", "_inputs", "_width", "_seed", "_k", "_passes"
        kept = {name: getattr(self, name) for name in (*names, "_draws", "_in_parts")}
        return {**kept, "routers": self._routers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy."""
        routers = state.pop("routers")
        self.__dict__.update(state)
        self._use(routers)
        self._connections()

    @property
    def moe(self) -> MoEConfig:
        """The options of the layers."""
        return self._moe

    @property
    def mesh(self) -> Mesh:
        """The place of this rank among those that shard the experts."""
        return self._mesh

    @property
    def timeout(self) -> timedelta:
        """How long a rank waits for others."""
        return timedelta(seconds=self._parallel.timeout_s)

    @property
    def tables(self) -> int:
        """A 64-bit digest of the tables; equal tables have equal digests."""
        return self._tables

    @property
    def k(self) -> int:
        """The number of active experts in new plans; the same on all ranks."""
        return self._k

    @k.setter
    def k(self, k: int) -> None:
        require(1 <= k <= self._num_experts, f"k={k}: must be in 1 .. {self._num_experts}, the number of experts")
        check_use(self._routers, Split.train, k)
        self._k = k

    def shard_sequences(self, group: dist.ProcessGroup) -> None:
        """Take parts of sequences from now on, as context parallelism has them: each rank of a group the next part.

        Every plan then gets the ids left of its part from the ranks before, in an exchange between the hosts. So each
        rank of the group must request plans in the same order, with the same number of sequences; the parts may be
        unequal in length. A copy of the model has no group: call it there, too.

        Args:
            group: a gloo group of its own, which nothing else uses (torch.distributed.new_group(ranks,
                backend="gloo")), whose ranks hold the parts from left to right.

        Raises:
            UserError: the group is of another backend.
        """
        backend = dist.get_backend(group)
        require(backend == "gloo", f"shard_sequences with a group of backend {backend}: must be gloo")
        self._part_group, self._in_parts = GlooGroup(group), True

    # Plans.

    def plan(self, ids: Tensor, left: Tensor | None = None, **context: Unpack[Context]) -> Plans:
        """Plan a batch for one forward pass, in the training process, not in a loader's worker.

        A plan can be made as soon as the ids are known. With several ranks in an expert group, each rank needs the ids
        of all. They are exchanged between the hosts, unless given. So all ranks must request plans, by this and every
        other method, in the same order. Their numbers of sequences and lengths may differ.

        What a router draws (fresh, stochastic, shuffled keys) follows from the seed, the number of the plan and that of
        the token: rank x the group's most tokens of a rank + its place in the batch, row by row. Plans requested while
        the model is in training mode are numbered by themselves, and those in evaluation begin with 0 each time.

        Args:
            ids: int [B, Q] of this rank; or [P, B, Q] of all ranks of the expert group, and then nothing is exchanged.
            left: as ids with C for Q, the ids left of each sequence. By default they count as 0, as at the start of a
                text.
            mask: as ids, 0 for padding, left or right of a sequence; ids after left padding begin a text. Padding has
                no expert: it costs no row, and the experts' sum for it is 0.
            documents: int as ids; a change of number begins a text. Left context belongs to the first document.
            routes: with moe.router=given, int [B, Q, y, K], the experts of each token in each of y layers (1 with
                moe.share_table), -1 after its last one. The first k are active; if tokens have unequal numbers, all.
            route_weights: as routes, fp32; for moe.weights=table.
            places: with moe.router=given and a file, int [B], the place of each sequence's first id in text_ids.

        Raises:
            UserError: an id is not in the vocabulary, or an argument has a wrong shape.
            RunFailed: the ranks of the expert group differ in k, in their tables or in the arguments that they give.
        """
        return self._submit(Sequences(ids, left, **context)).result()

    def request(self, told: CallArguments, call: Call) -> Future[Plans]:
        """Begin to plan a call in the planner's thread, from its own arguments; the ranks' order is as for `plan`."""
        side = side_of(self.replaced[0].name) if self.replaced else ""
        return self._submit(told.read(call, self._moe.ngram - 1, side, parts=self._in_parts))

    def ahead(
        self, batches: Iterable[Batch], depth: int = 2, *, ids: Any = 0, **context: Any
    ) -> Iterator[tuple[Plans, Batch]]:
        """Yield each batch with its plans, which a thread makes while earlier batches train.

            for plans, (ids, targets) in experts.ahead(loader):
                with experts.planned(plans):
                    ...

        A change of k takes effect after the next `depth` batches. With several ranks in an expert group, all must take
        the same number of batches.

        Args:
            ids: the position of the ids in a batch, or their key in a mapping.
            context: likewise of other arguments of `plan`, such as mask="attention_mask".
        """
        waiting: deque[tuple[Future[Plans], Batch]] = deque()
        for batch in batches:
            found = {name: _item(batch, name, place) for name, place in {"ids": ids, **context}.items()}
            waiting.append((self._submit(Sequences(**found)), batch))
            if len(waiting) > depth:
                plans, batch = waiting.popleft()
                yield plans.result(), batch
        for plans, batch in waiting:
            yield plans.result(), batch

    # Forward passes.

    @contextlib.contextmanager
    def planned(self, ids: Tensor | Plans, left: Tensor | None = None, **context: Unpack[Context]) -> Iterator[Plans]:
        """Run one forward pass of the model inside, in this thread, with these plans or with plans of these ids.

        Activation checkpointing runs the layers again in backward, which then also belongs inside.
        """
        if self.passes.running() is not None:
            raise RuntimeError("planned() inside planned(): one forward pass at a time")
        plans = ids
        if not isinstance(plans, Plans):
            plans = self.plan(plans, left, **context)
        running = self._begin(plans)
        try:
            yield plans
        finally:
            running.over = True
            self.passes.end()

    def attach(
        self,
        model: nn.Module,
        ids: Place = 0,
        *,
        left: Place | Callable[..., Tensor | None] | None = None,
        mask: Place | None = None,
        positions: Place | None = None,
        documents: Place | None = None,
        layout: Layout | None = None,
        **context: Place,
    ) -> Attachment:
        """Make each call of the model, or of a DeepSpeed engine, plan from its own arguments, except inside `planned`.

        Planning is then part of the step. Each argument here names an argument of the call, by its position or its
        keyword. A call is refused if the named arguments do not determine its n-grams. Without `left`, that is a call
        shorter than an n-gram, with a cache, or with positions that do not begin with 0. It is also a call with an
        attention mask, several documents or equal sizes that no argument here names. A continued text that no argument
        of the call shows (chunked prefill without positions) is not detected. Each step of transformers' generate plans
        from all ids so far: for a model that generates by it nothing needs to be named for its cache.

        Args:
            ids: the ids [B, Q].
            left: the ids left of each sequence [B, any number]; or a function of the call's arguments that returns
                them, or None.
            mask: [B, Q], 0 for padding; longer on the left if it covers a cache.
            positions: positions of the ids in their texts, [B, Q] or [Q]; a text begins where they are not consecutive.
            documents: document numbers [B, Q]; a text begins where they change.
            layout: "BQ", the default if sizes differ; "QB" if all of these and the hidden states are [Q, B]; "BQ->QB"
                if only the hidden states are.
            context: routes, route_weights and places, as for `plan`.
        """
        return self.attach_by(model, CallArguments(ids, left, mask, positions, documents, layout, **context))

    def attach_by(self, model: nn.Module, told: CallArguments) -> Attachment:
        """Make each call of the model plan from its arguments, as `attach` does."""
        generated = generated_ids(model)
        before = model.register_forward_pre_hook(Before(self, told, generated), with_kwargs=True)
        after = model.register_forward_hook(After(self, generated), always_call=True)
        return Attachment((before, after, *([] if generated is None else [generated])))

    def begin_call(self, told: CallArguments, call: Call) -> None:
        """Plan a call of an attached model that has no plan; its hook calls this."""
        self.passes.begin(None)  # end_call always removes one
        if self.passes.running() is not None or backward_node() is not None:
            return  # inside `planned`, inside another attached call, or in activation checkpointing of the whole model
        plans = self.request(told, call).result()
        self.passes.end()
        self._begin(plans)

    def end_call(self, outputs: Any) -> None:
        """Record the call's pass on the graph of its outputs, for activation checkpointing in backward."""
        running = self.passes.end()
        if running is not None:
            self.passes.note(outputs, running)

    def call(self, layer: int, x: Tensor) -> tuple[Routing, Pass]:
        """Return the routing of a layer for x, and its pass; the layers call this."""
        node = backward_node()
        running = self.passes.running() if node is None else self.passes.of_node(node, layer)
        if node is None and running is None:
            raise RuntimeError(
                "an expert layer has no plan: call the model inside `with experts.planned(ids):`, in the same thread,"
                " or experts.attach(model) once"
            )
        if running is None or running.over or (node is not None and layer not in running.plans.used):
            raise RuntimeError(
                "an expert layer is recomputed in backward, but the plan of its forward pass is gone: run backward"
                " before the next forward pass, and inside the same `with experts.planned(ids):`"
            )
        plans = running.plans
        if node is None and layer in plans.used:
            raise RuntimeError(
                "an expert layer has already run with this plan: every forward pass needs a plan of its own ids"
            )
        if x.shape[:-1] not in (plans.shape, (plans.shape[0] * plans.shape[1],)):
            raise ValueError(f"x is {list(x.shape)}: the plan is for ids {list(plans.shape)}, sequences first")
        self._connect(x.device)
        plans.used.add(layer)
        return Routing(plans.k, plans.plans, plans.token_T, running.dropout_seed, real_T=plans.real_T), running

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return k, the tables, which the model's state_dict does not hold, and the rank to which they belong."""
        return {
            "place": self._place(),
            "k": self.k,
            "dropout": (self._seed, self._passes),
            "draws": self._draws,
            "tables": [router.state() for router in self._routers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of state_dict.

        Raises:
            UserError: the number of tables or experts differs; or experts are sharded, and the rank, the number of
                ranks or the size of the expert group differs, for which the same file holds other experts.
        """
        inputs = replace(self._inputs, seed=state["dropout"][0])
        routers = type(self._routers[0]).restore(self._moe, inputs, state["tables"])
        shape = len(routers), routers[0].columns
        here = len(self._routers), self._num_experts
        require(shape == here, f"saved with (tables, experts) = {shape}: must be {here} as here")
        place, here_place = tuple(state["place"]), self._place()
        require(
            place == here_place,
            f"saved by (rank, of ranks, in expert groups of) = {place}: must be {here_place} as here",
        )
        self._use(routers)
        self.k, (self._seed, self._passes) = state["k"], state["dropout"]
        self._draws = self._requested = state.get("draws", self._passes)

    def _place(self) -> tuple[int, int, int]:
        mesh = self._mesh
        return (mesh.rank, mesh.world, mesh.ep_size) if mesh.ep_size > 1 else (0, 1, 1)

    def _use(self, routers: Sequence[PlannedRouter]) -> None:
        self._routers = [router.place(self._mesh) for router in routers]
        self._num_experts = routers[0].columns
        self._tables = tables_digest(self._routers)

    def _submit(self, sequences: Sequences) -> Future[Plans]:
        if _forks != self._forks:  # the thread belongs to the other process: its result would never come
            raise UserError(
                "planning in a forked process, such as a DataLoader's worker: must be in the training process;"
                " ahead(loader) plans in a thread of it"
            )
        training = self.layers[0].training
        with self._lock:
            number = self._requested if training else self._held_out
            self._requested, self._held_out = self._requested + training, 0 if training else number + 1
        return self._thread.submit(self._plan, sequences, self.k, number, held_out=not training)

    def _plan(self, sequences: Sequences, k: int, number: int, *, held_out: bool) -> Plans:
        for name in ("routes", "places"):
            unused = getattr(sequences, name) is None or self._routers[0].of_places
            require(unused, f"{name}: must be None with moe.router={self._moe.router}; given takes them")
        if sequences.places is not None and isinstance(sequences.ids, Tensor):
            text = () if self._inputs.splits is None else self._inputs.splits(Split.train)
            check_places(sequences.places, sequences.ids.shape[-1], len(text))
        shape, inputs = self._group_inputs(sequences, k, number, held_out=held_out)
        mesh, parallel, weight = self._mesh, self._parallel, self.layers[0].experts.first_weight
        tokens = inputs.num_tokens
        gather = use_gather(
            parallel,
            experts=self._moe.experts,
            ranks=mesh.ep_size,
            k=k,
            tokens=tokens,
            width=self._width,
            itemsize=wire_dtype(parallel, weight.dtype).itemsize,
        )
        rank = dist.get_rank() if dist.is_initialized() else 0
        token_T = (rank - mesh.ep_rank) * tokens + torch.arange(mesh.ep_size * tokens)
        draw = Draw(token_T.view(mesh.ep_size, tokens).numpy(), number, held_out)
        plans = plan_all(self._routers, inputs.tokens(draw), k, gather=gather, chunks=parallel.chunks)
        if self._delivery is None or self._delivery.device != weight.device:
            self._delivery = Delivery(weight.device)
        (plans, token_T), copied = self._delivery.send((plans, token_T))
        return Plans(k, shape, self._tables, plans, token_T, copied, 0 if held_out else number + 1)

    def _group_inputs(
        self, sequences: Sequences, k: int, number: int, *, held_out: bool
    ) -> tuple[tuple[int, ...], PlanInputs]:
        """Return the shape of this rank's hidden states but for D, and the inputs of all ranks of the expert group."""
        ids, left = checked_ids(
            sequences, ngram=self._moe.ngram, vocab_size=self._inputs.vocab_size, ranks=self._mesh.ep_size
        )
        if self._in_parts:
            require(self._part_group is not None, "a copy of a model with parts of sequences: call shard_sequences")
            assert self._part_group is not None
            with self._together("the group of its sequences"):
                left = left_of_part(sequences, ids, self._moe.ngram - 1, self._part_group)
        shape = tuple(ids.shape[-2:])
        inputs = plan_inputs(sequences, ids, left)
        if ids.dim() == 2:
            cpu_group = self._cpu_group = self._cpu_group or self._reconnect()
            facts = {"k": k, "tables": self._tables, "evaluation": held_out, "plans": number}
            with self._together("its expert group"):
                inputs = share(inputs, cpu_group, facts, first_rank=self._mesh.ep_ranks.start)
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
                f"rank {self._mesh.rank} planned a forward pass, and not all ranks of {ranks} did so within"
                f" {self.timeout.total_seconds():g} s: all must run each forward pass, evaluation too"
                f" ({str(error).splitlines()[0]})"
            ) from error

    def _reconnect(self) -> CpuGroup:
        """Connect a copy to the other ranks of its expert group; a collective over all ranks."""
        mesh = self._mesh
        if mesh.ep_size > 1:
            place = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
            require(
                place == (mesh.rank, mesh.world),
                f"copied on (rank, of ranks) = {mesh.rank, mesh.world}, which holds other experts: must be used there",
            )
        return expert_cpu_group(mesh, self.timeout)

    def _begin(self, plans: Plans) -> Pass:
        require(plans.tables == self._tables, "these plans are of other tables than the model's")
        receive((plans.plans, plans.token_T, plans.real_T), plans.copied)
        with self._lock:
            seed = self._seed * 2**32 + self._passes
            self._passes += 1
            self._draws = max(self._draws, plans.draws)
        running = Pass(plans, seed, torch.autograd._get_sequence_nr())
        self.passes.begin(running)
        return running

    def connect(self) -> ExpertGroupComm | None:
        """Connect the layers to their expert group now instead of in the first pass, and return its communicator.

        Raises:
            RuntimeError: DeepSpeed has not created the group yet.
        """
        self._connect(self.layers[0].experts.first_weight.device)
        return self.comm

    def _connect(self, device: torch.device) -> None:
        """Connect the layers to the expert group, after DeepSpeed has created it."""
        if self.comm is not None or self._mesh.ep_size == 1:
            return
        self.comm = expert_group_comm(self._mesh, device, timed=False)
        for layer in self.layers:
            backend = layer.experts.kernels.backend
            layer.connect(build_exchange(self.comm, self._parallel, backend))


def _item(batch: Any, name: str, place: Any) -> Any:
    """Return an argument of `plan` from a batch."""
    try:
        return batch[place]
    except (LookupError, TypeError):
        raise UserError(
            f"a batch is {kind_of(batch)}, without {name}={place!r}: ahead(batches, {name}=..) must be the position or"
            f" key of the {name}"
        ) from None
