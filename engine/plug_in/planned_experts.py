"""The forward passes of expert layers inside the user's model; engine/plug_in/replace.py inserts the layers.

A layer (engine/plug_in/planned_layer.py) receives hidden states only, and the model around it has no plans. So
PlannedExperts holds the plans of the forward passes in progress, and each layer gets its plan from it. A plan is for
one forward pass: a layer that would use another pass's plan raises. engine/plug_in/batch_planner.py makes the plans.

Letters: B sequences, Q ids of each, C = ngram - 1 ids left of them, D width, T = B*Q tokens, P ranks of the expert
group.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn
from torch import distributed as dist

from foreroute.engine.ahead import Ahead
from foreroute.engine.config import MoEConfig
from foreroute.engine.data.device_copy import receive
from foreroute.engine.errors import UserError, require
from foreroute.engine.moe.exchange import build_exchange
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.optim.expert_sharding import expert_group_comm
from foreroute.engine.parallel.collectives import ExpertGroupComm
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.plug_in.attached import After, Attachment, Before, generated_ids
from foreroute.engine.plug_in.batch_planner import BatchPlanner
from foreroute.engine.plug_in.call_arguments import Call, CallArguments, Layout, Place, kind_of
from foreroute.engine.plug_in.passes import Pass, Passes, backward_node
from foreroute.engine.plug_in.plans import Context, Plans, Sequences
from foreroute.engine.plug_in.replaceable import Replaced, side_of
from foreroute.engine.routing.plan import Routing

Batch = TypeVar("Batch", bound=Sequence[Any] | Mapping[Any, Any])


class PlannedExperts:
    """The expert layers of a model, their planner, and the plans of the current pass; made by replace_feed_forwards.

    A copy of the model (copy.deepcopy, pickle, torch.save, AveragedModel) has its own, with the same tables, k and
    number of passes, and without plans: engine.plug_in.experts_of returns it. If experts are sharded, it connects to
    the other ranks at its first plan, so every rank of the run must plan with its copy.
    """

    comm: ExpertGroupComm | None = None
    """The communicator of the expert group, with counts and times; None before the first pass and on one rank."""

    replaced: tuple[Replaced, ...] = ()
    """The replaced modules, layer by layer."""

    def __init__(self, layers: Sequence[MoELayer], planner: BatchPlanner, *, seed: int, k: int) -> None:
        """Set the layers, numbered from 0, and the planner of their routers.

        Args:
            seed: that of the experts' dropout.
        """
        self.layers, self.planner, self._seed = layers, planner, seed
        self.k = k
        self._passes = 0  # number of passes begun
        self._connections()

    def _connections(self) -> None:
        """Create the state that a copy does not share."""
        self.passes = Passes()
        self._lock = threading.Lock()
        self.comm = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, without locks, connections and plans."""
        names = "layers", "replaced", "planner", "_seed", "_k", "_passes"
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy."""
        self.__dict__.update(state)
        self._connections()

    @property
    def moe(self) -> MoEConfig:
        """The options of the layers."""
        return self.planner.moe

    @property
    def mesh(self) -> Mesh:
        """The place of this rank among those that shard the experts."""
        return self.planner.mesh

    @property
    def timeout(self) -> timedelta:
        """How long a rank waits for others."""
        return self.planner.timeout

    @property
    def tables(self) -> int:
        """A 64-bit digest of the tables; equal tables have equal digests."""
        return self.planner.tables

    @property
    def k(self) -> int:
        """The number of active experts in new plans; the same on all ranks."""
        return self._k

    @k.setter
    def k(self, k: int) -> None:
        self.planner.check_k(k)
        self._k = k

    # Plans.

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
        self.planner.shard_sequences(group)

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
        return self.planner.submit(Sequences(ids, left, **context), self.k).result()

    def request(self, told: CallArguments, call: Call) -> Future[Plans]:
        """Begin to plan a call in the planner's thread, from its own arguments; the ranks' order is as for `plan`."""
        side = side_of(self.replaced[0].name) if self.replaced else ""
        return self.planner.submit(told.read(call, self.moe.ngram - 1, side, parts=self.planner.in_parts), self.k)

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
        requests = ((self._requested(batch, {"ids": ids, **context}), batch) for batch in batches)
        for plans, batch in Ahead(requests, depth):
            yield plans.result(), batch

    def _requested(self, batch: Any, places: dict[str, Any]) -> Future[Plans]:
        found = {name: _item(batch, name, place) for name, place in places.items()}
        return self.planner.submit(Sequences(**found), self.k)

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
        self.connect(x.device)
        plans.used.add(layer)
        return Routing(plans.k, plans.plans, plans.token_T, running.dropout_seed, real_T=plans.real_T), running

    def _begin(self, plans: Plans) -> Pass:
        require(plans.tables == self.tables, "these plans are of other tables than the model's")
        receive((plans.plans, plans.token_T, plans.real_T), plans.copied)
        self.planner.used(plans)
        with self._lock:
            seed = self._seed * 2**32 + self._passes
            self._passes += 1
        running = Pass(plans, seed, torch.autograd._get_sequence_nr())
        self.passes.begin(running)
        return running

    def connect(self, device: torch.device | None = None) -> ExpertGroupComm | None:
        """Connect the layers to their expert group now instead of in the first pass, and return its communicator.

        Args:
            device: that of the hidden states; by default that of the experts' weights.

        Raises:
            RuntimeError: DeepSpeed has not created the group yet.
        """
        if self.comm is None and self.mesh.ep_size > 1:
            device = device or self.layers[0].experts.first_weight.device
            self.comm = expert_group_comm(self.mesh, device, timed=False)
            for layer in self.layers:
                backend = layer.experts.kernels.backend
                layer.connect(build_exchange(self.comm, self.planner.parallel, backend))
        return self.comm

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return k, the number of passes, the rank to which the state belongs, and the state of the planner.

        Planned routers' tables are in it, which the model's state_dict does not hold; live routers are in the model's.
        """
        dropout = self._seed, self._passes
        return {"place": self._place(), "k": self.k, "dropout": dropout, **self.planner.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of state_dict.

        Raises:
            UserError: the number of tables or experts differs; or experts are sharded, and the rank, the number of
                ranks or the size of the expert group differs, for which the same file holds other experts.
        """
        place, here = tuple(state["place"]), self._place()
        require(place == here, f"saved by (rank, of ranks, in expert groups of) = {place}: must be {here} as here")
        self.planner.load_state_dict(state)
        self.k, (self._seed, self._passes) = state["k"], state["dropout"]

    def _place(self) -> tuple[int, int, int]:
        mesh = self.mesh
        return (mesh.rank, mesh.world, mesh.ep_size) if mesh.ep_size > 1 else (0, 1, 1)


def _item(batch: Any, name: str, place: Any) -> Any:
    """Return an argument of `plan` from a batch."""
    try:
        return batch[place]
    except (LookupError, TypeError):
        raise UserError(
            f"a batch is {kind_of(batch)}, without {name}={place!r}: ahead(batches, {name}=..) must be the position or"
            f" key of the {name}"
        ) from None
