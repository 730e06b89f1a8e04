"""The experts of one layer on this rank: stacked parameters and the call of kernels.moe_ffn.

The names and shapes of the parameters determine checkpoint keys and satisfy DeepSpeed's expert-parallel contract: w1,
w2 and, with a gate, w3, each [L, F, D], and the biases b1 [L, F], b2 [L, D]. Every matrix, w2 too, has one row per
hidden unit, so that all experts together are one dense feed-forward, seen as [L*F, D].

Letters: L experts on this rank, D width, F expert hidden width, R received rows, T local tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from foreroute.engine.config import Backend, KernelsConfig, MoEConfig
from foreroute.engine.moe.exchange import Exchange, Local, check_plan
from foreroute.engine.moe.gate import LiveGate
from foreroute.engine.moe.overlap import ChunkCall, run_in_chunks
from foreroute.engine.routing.plan import Chunk, Plan
from foreroute.engine.tracing import traced
from foreroute.kernels import Dropout, ExpertWeights, moe_ffn


class Experts(nn.Module):
    """E_i(x) = W2_i Dropout(act(W1_i x + b1_i)) + b2_i for the local experts i; with a gate act(.) * (W3_i x)."""

    w3: nn.Parameter | None
    first_L1: Tensor | None

    def __init__(self, width: int, moe: MoEConfig, kernels: KernelsConfig, slices: Sequence[int] = ()) -> None:
        """Build all experts.

        Args:
            slices: of how many neighbouring experts each wider one consists (PlannedRouter.slices). The first has its
                output bias; those of the others stay zero.
        """
        super().__init__()
        shape = (moe.experts, moe.expert_width, width)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.b1 = nn.Parameter(torch.zeros(shape[:2]))
        self.w2 = nn.Parameter(torch.empty(shape))
        self.b2 = nn.Parameter(torch.zeros(moe.experts, width))
        self.activation = moe.activation
        self.register_parameter("w3", nn.Parameter(torch.empty(shape)) if moe.activation.gated else None)
        first = [place == 0 for size in slices for place in range(size)]
        bias_of = None if all(first) else torch.tensor(first).float()[:, None]
        self.register_buffer("first_L1", bias_of, persistent=False)
        self.kernels = kernels
        self.masked_from_k = moe.experts + 1
        if kernels.masked_from_k is not None:
            self.masked_from_k = kernels.masked_from_k
        self.init_weights(0.02)

    @property
    def first_weight(self) -> Tensor:
        """A parameter, for its device and format; ZeRO-3 gathers one that is read by its name during a forward pass."""
        return next(self.parameters())

    def init_weights(self, std: float) -> None:
        """Draw each expert's matrices from N(0, std^2); biases are zero."""
        for weight in (self.w1, self.w2, self.w3):
            if weight is not None:
                nn.init.normal_(weight, 0.0, std)

    def keep(self, experts: range) -> None:
        """Keep these experts and drop the others."""
        for name, parameter in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(parameter.detach()[experts.start : experts.stop].clone()))
        for name, buffer in list(self.named_buffers()):
            setattr(self, name, buffer[experts.start : experts.stop].clone())

    def without_biases(self, names: Iterable[str] = ("b1", "b2")) -> None:
        """Make biases zeros that are neither trained nor saved."""
        for name in names:
            zeros = torch.zeros_like(self.get_parameter(name), requires_grad=False)
            delattr(self, name)
            self.register_buffer(name, zeros, persistent=False)

    def forward(
        self,
        rows_RD: Tensor,
        plan: Plan,
        dropout: Dropout | None,
        *,
        weight_N: Tensor | None = None,
        exchange: Exchange | Local | None = None,
        gate: LiveGate | None = None,
    ) -> Tensor:
        """Return the weighted sum of each received row's local experts.

        ZeRO-3 gathers the weights around this call, so every use of them happens in it. A plan of several chunks is
        therefore exchanged here; then rows_RD and the result are the rows of the local tokens [T, D].

        Args:
            dropout: with the numbers of all tokens of the expert group, rank by rank.
            weight_N: mixing weights of a plan of one chunk; None: those of the plan.
            exchange: the exchange for a plan of several chunks.
            gate: makes the weights of a plan of several chunks; None: those of the plan.

        Raises:
            ValueError: the plan is for other ranks or another number of tokens.
        """
        b2 = self.b2 if self.first_L1 is None else self.b2 * self.first_L1.to(self.b2.dtype)
        weights = ExpertWeights(self.w1, self.b1, self.w2, b2, self.w3)
        calls = [self._call(rows_RD, chunk, plan.k, dropout) for chunk in plan.chunks]
        if len(calls) > 1:
            assert isinstance(exchange, Exchange), "one rank has plans of one chunk"
            check_plan(rows_RD, plan, ranks=exchange.comm.ranks)
            return run_in_chunks(rows_RD, calls, weights, exchange, gate)
        (call,) = calls
        weight_N = call.weight_N if weight_N is None else weight_N
        assert weight_N is not None, "a plan for live weights needs a gate"
        return traced("experts", moe_ffn, rows_RD, weight_N, weights, call.chunk.rows, **call.options)

    def _call(self, rows_RD: Tensor, chunk: Chunk, k: int, dropout: Dropout | None) -> ChunkCall:
        if dropout is not None and chunk.received_R is not None:
            dropout = replace(dropout, token_R=dropout.token_R.index_select(0, chunk.received_R))
        backend = self.kernels.backend.value
        if self.kernels.backend is Backend.auto:
            backend = "triton" if rows_RD.is_cuda else "cpu"
        options = {
            "activation": self.activation.function,
            "dropout": dropout,
            "masked": backend == "cpu" and k >= self.masked_from_k,
            "backend": backend,
            "mode": self.kernels.mode.value,
            "precision": self.kernels.precision.value,
            "debug": self.kernels.debug,
        }
        wide = torch.promote_types(rows_RD.dtype, torch.float32)
        return ChunkCall(chunk, None if chunk.weight_N is None else chunk.weight_N.to(wide), options)
