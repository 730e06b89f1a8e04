"""Expert layers of the user's model whose routers are live: their choices need hidden states, so nothing is planned.

Such a layer needs no plan, but the number of active experts, numbers of tokens for dropout, and which ids are padding.
It therefore also runs outside of `planned` and without `attach`; then no id is padding. A live router may have a loss,
a state that changes after a step, and values for the router of the next layer; LiveExperts keeps them.

Letters: B sequences, Q ids of each, T = B*Q tokens of this rank, L expert layers, E experts.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.engine.errors import require
from foreroute.engine.moe.layer import LayerOutput, MoELayer, share_routers, update_routers
from foreroute.engine.optim.expert_sharding import balance_over_ranks
from foreroute.engine.parallel.collectives import ExpertGroupComm, all_reduce_sum
from foreroute.engine.plug_in.batch_planner import BatchPlanner
from foreroute.engine.plug_in.call_arguments import Call, CallArguments
from foreroute.engine.plug_in.passes import Pass, backward_node
from foreroute.engine.plug_in.plan_inputs import PlanInputs
from foreroute.engine.plug_in.planned_experts import PlannedExperts
from foreroute.engine.plug_in.planned_layer import PlannedFeedForward
from foreroute.engine.plug_in.plans import Plans, Sequences
from foreroute.engine.routing.plan import Routing


class LivePlanner(BatchPlanner):
    """The planner of live routers: it finds which ids are padding, and how many tokens the ranks of a group have."""

    @property
    def columns(self) -> int:
        """The number of experts."""
        return self.moe.columns

    @property
    def tables(self) -> int:
        """0: there are no tables."""
        return 0

    def check_sequences(self, sequences: Sequences) -> None:
        """Raise UserError for routes and places, which live routers do not take."""
        planned = sequences.routes is not None or sequences.places is not None
        require(not planned, f"routes and places: must be None with moe.router={self.moe.router}; given takes them")

    def make(self, shape: tuple[int, ...], inputs: PlanInputs, k: int, number: int, *, held_out: bool) -> Plans:
        """Return the padding of a batch, and the numbers of its tokens."""
        real_PT = inputs.real_SX.flatten(1)
        return self.unplanned(shape, k, inputs.num_tokens, None if real_PT.all() else real_PT[self.mesh.ep_rank])

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the routers are part of the model's state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore nothing."""

    def unplanned(self, shape: tuple[int, ...], k: int, tokens: int, real_T: Tensor | None = None) -> Plans:
        """Return what live routers need in place of plans.

        Args:
            tokens: the largest number of tokens of a rank of the expert group.
            real_T: bool, false for padding; None: there is none.
        """
        device = self._layer.experts.first_weight.device
        token_T = self._token_T(tokens, self.mesh.rank, device)
        return Plans(k, shape, 0, None, token_T, None, real_T=None if real_T is None else real_T.to(device))


class LiveExperts(PlannedExperts):
    """The expert layers of a model with live routers, and what these leave behind in a pass.

    `planned`, `plan`, `ahead` and `attach` work as for planned routers, though they only say which ids are padding, and
    how many tokens the ranks of the expert group have, which may be unequal then, but not 0; without them they must be
    equal. Ids left of a text and documents make no difference. Losses are those of the last pass: call a model in one
    thread.
    """

    planner: LivePlanner

    def __init__(self, layers: Sequence[MoELayer], planner: LivePlanner, *, seed: int, k: int) -> None:
        """Set the layers, numbered from 0, and their planner."""
        super().__init__(layers, planner, seed=seed, k=k)
        share_routers(nn.ModuleList(layers))

    def _connections(self) -> None:
        super()._connections()
        self._of_thread = threading.local()
        self._balanced = False
        self._last: Pass | None = None
        self._losses: dict[int, Tensor] = {}
        self._carried: Tensor | None = None
        self._carries = False
        self._count_LE: Tensor | None = None

    # What the routers leave behind.

    def auxiliary_loss(self) -> Tensor:
        """Return the sum of the routers' losses in the last forward pass, weighted by moe.balance_loss and the like.

        Add it to the loss before backward. It is fp32, a scalar, 0 for routers without a loss, and the mean over ranks
        of it is the loss of all tokens. It holds the graph of the pass until the next one.
        """
        return sum(self._losses.values(), torch.zeros((), device=self.layers[0].experts.first_weight.device))

    def after_step(self) -> None:
        """Let routers change their own state after an optimizer step, such as the bias of sigmoid_bias.

        It adds up the experts' rows over all ranks, and of all forward passes in training since the last call: a
        collective over all ranks.
        """
        count_LE, self._count_LE = self._count_LE, None
        if count_LE is None:
            return
        total_LE = all_reduce_sum(count_LE).double() / self.mesh.ep_size  # each rank has the counts of its group
        with torch.no_grad():
            update_routers(nn.ModuleList(self.layers), total_LE)

    def carried(self, running: Pass, layer: int) -> Tensor | None:
        """Return what the router of the layer before passes on; the layers call this."""
        if backward_node() is not None:
            if self._carries and layer > 0:
                raise RuntimeError(
                    "an expert layer is recomputed in backward, but its router needs values of the layer before: use no"
                    f" activation checkpointing with moe.router={self.moe.router}"
                )
            return None
        return self._carried if running is self._last else None

    def keep(self, running: Pass, layer: int, output: LayerOutput) -> None:
        """Keep what a layer's router leaves behind; the layers call this."""
        if backward_node() is not None:
            return  # a recomputation of what was kept
        if running is not self._last:
            self._last, self._losses = running, {}
        self._carried, self._carries = output.carried, self._carries or output.carried is not None
        if output.auxiliary_loss is not None:
            self._losses[layer] = output.auxiliary_loss
        if self.layers[layer].training and torch.is_grad_enabled():
            count_E = output.count_E.detach()
            if self._count_LE is None:
                self._count_LE = count_E.new_zeros(len(self.layers), count_E.numel())
            self._count_LE[layer] += count_E

    # Forward passes.

    def request(self, told: CallArguments, call: Call) -> Future[Plans]:
        """Read which ids of a call are padding; ids left of it make no difference."""
        return super().request(replace(told, left=told.left or _no_ids), call)

    def call(self, layer: int, x: Tensor) -> tuple[Routing, Pass]:
        """Return the routing of a layer for x, and its pass, which begins here outside of any other."""
        tokens = x.shape[:-1].numel()
        if backward_node() is not None:
            return super().call(layer, x.reshape(tokens, -1))
        if self.passes.running() is not None:
            return super().call(layer, x)
        own: Pass | None = getattr(self._of_thread, "own", None)
        if own is None or layer in own.plans.used or own.plans.shape != (tokens, 1):
            own = self._begin(self.planner.unplanned((tokens, 1), self.k, tokens))
            self._of_thread.own = own
        else:
            self.passes.begin(own)
        try:
            return super().call(layer, x.reshape(tokens, -1))
        finally:
            self.passes.end()

    def connect(self, device: torch.device | None = None) -> ExpertGroupComm | None:
        """Connect the layers to their expert group, and let routers balance over all ranks, before the first pass."""
        comm = super().connect(device)
        if not self._balanced:
            self._balanced = True
            balance_over_ranks(nn.ModuleList(self.layers), self.moe, self.mesh)
        return comm


class LiveFeedForward(PlannedFeedForward):
    """An expert layer with a live router that replaces a feed-forward: x [..., D] to [..., D]."""

    _experts: LiveExperts

    def _run(self, x_TD: Tensor, routing: Routing, running: Pass, seen_TD: Tensor | None) -> LayerOutput:
        layer = self.moe.layer
        output: LayerOutput = self.moe(x_TD, routing, self._experts.carried(running, layer), seen_TD)
        self._experts.keep(running, layer, output)
        return output


def _no_ids(*_: Any, **__: Any) -> None:
    """Return no ids left of a call."""
