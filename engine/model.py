"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860) with a feed-forward or an expert layer in every block.

Memory goes in and comes out: the inputs of each layer at the last M positions, without gradient. Routing comes in as
plans (planned routers) or happens inside the layers (live ones). Knows no optimizer, no process group, no text.

Letters: B streams, Q segment length, M memory length, S = M+Q, D width, V vocabulary, L layers, E experts, T = B*Q.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.attention import sinusoids
from engine.block import Block, Positions
from engine.config import KernelsConfig, ModelConfig, MoEConfig
from engine.moe.experts import Experts
from engine.moe.layer import LayerCall
from engine.moe.plan import Plan

Memory = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Routing:
    """How the expert layers of one forward pass route."""

    k: int  # active experts
    plans: tuple[Plan, ...] | None = (
        None  # one per table: per layer, or a single one that all layers share
    )
    dropout_seed: int = 0  # of (run, step, micro-batch)
    first_token: int = 0  # global number of the first token; they are consecutive


class Output(NamedTuple):
    """Result of a forward pass with targets."""

    loss: Tensor  # scalar: mean nats plus auxiliary losses
    nll_BQ: Tensor  # fp32 nats of each symbol, detached
    memory: Memory  # a [B, m, D] tensor per layer
    count_LE: Tensor | None  # int64 rows of each layer's experts; None for dense


class Hidden(NamedTuple):
    """Result of a forward pass before the loss."""

    logits_BQV: Tensor
    memory: Memory
    auxiliary_loss: Tensor
    count_LE: Tensor | None


class TransformerXL(nn.Module):
    """Language model over symbols.

    `recompute` (off) keeps only each block's input for backward and runs the block again.
    """

    def __init__(
        self, model: ModelConfig, moe: MoEConfig, kernels: KernelsConfig, vocab_size: int
    ) -> None:
        super().__init__()
        self.config = model
        self.recompute = False
        self.embedding = nn.Embedding(vocab_size, model.width)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        self.u = nn.Parameter(torch.empty(model.heads, model.head_width))
        self.v = nn.Parameter(torch.empty(model.heads, model.head_width))
        self.blocks = nn.ModuleList(Block(model, moe, kernels, i) for i in range(model.layers))
        self.final_norm = nn.LayerNorm(model.width) if model.pre_norm else None
        self.dropout = nn.Dropout(model.dropout)
        self._init_weights(model.init_std)

    def _init_weights(self, std: float) -> None:
        """Draw as published: matrices, embeddings, u and v from N(0, std^2), LayerNorm gains N(1, std^2), biases 0."""
        nn.init.normal_(self.u, 0.0, std)
        nn.init.normal_(self.v, 0.0, std)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, 0.0, std)
            elif isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight, 1.0, std)
            elif isinstance(module, Experts):
                module.init_weights(std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, ids_BQ: Tensor, targets_BQ: Tensor, memory: Memory | None, routing: Routing, *,
        memory_len: int | None = None, clamp_len: int = 0, same_length: bool = False,
    ) -> Output:  # fmt: skip
        """Predict targets_BQ; arguments as in `logits`."""
        hidden = self.logits(
            ids_BQ,
            memory,
            routing,
            memory_len=memory_len,
            clamp_len=clamp_len,
            same_length=same_length,
        )
        logits_TV = hidden.logits_BQV.flatten(0, 1).float()
        nll_T = F.cross_entropy(logits_TV, targets_BQ.flatten(), reduction="none")
        loss = nll_T.mean() + hidden.auxiliary_loss
        return Output(loss, nll_T.detach().view_as(targets_BQ), hidden.memory, hidden.count_LE)

    def logits(
        self, ids_BQ: Tensor, memory: Memory | None, routing: Routing, *,
        memory_len: int | None = None, clamp_len: int = 0, same_length: bool = False,
    ) -> Hidden:  # fmt: skip
        """Run the model on a segment.

        Args:
            memory: of the previous segment; None at the start of a stream.
            memory_len: positions kept in the memory; None means the model's.
            clamp_len: distances beyond this are encoded as this; 0 for no clamp.
            same_length: every position sees exactly memory_len positions (itself and what is left of it).
        """
        keep = self.config.memory if memory_len is None else memory_len
        x_BQD = self.dropout(self.embedding(ids_BQ) * self.config.width**0.5)
        if memory is None:
            memory = tuple(x_BQD[:, :0].detach() for _ in self.blocks)
        positions = self._positions(
            memory[0].shape[1] + ids_BQ.shape[1], clamp_len, keep if same_length else None
        )
        new_memory, losses, counts = [], [], []
        for i, (block, memory_BMD) in enumerate(zip(self.blocks, memory, strict=True)):
            new_memory.append(
                torch.cat([memory_BMD, x_BQD.detach()], dim=1)[:, -keep:]
                if keep
                else memory_BMD[:, :0]
            )
            arguments = (x_BQD, memory_BMD, positions, self._call(i, routing, ids_BQ))
            if self.recompute and torch.is_grad_enabled():
                x_BQD, loss, count_E = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BQD, loss, count_E = block(*arguments)
            losses.append(loss)
            if count_E is not None:
                counts.append(count_E)
        if self.final_norm is not None:
            x_BQD = self.final_norm(x_BQD)
        logits_BQV = F.linear(self.dropout(x_BQD), self.embedding.weight, self.output_bias)
        return Hidden(
            logits_BQV,
            tuple(new_memory),
            torch.stack(losses).sum(),
            torch.stack(counts) if counts else None,
        )

    def _positions(self, keys: int, clamp_len: int, window: int | None) -> Positions:
        distances_S = torch.arange(keys, device=self.u.device)
        if clamp_len:
            distances_S = distances_S.clamp(max=clamp_len)
        encoding_SD = sinusoids(distances_S, self.config.width).to(self.u.dtype)
        return Positions(self.dropout(encoding_SD), self.u, self.v, window)

    def _call(self, layer: int, routing: Routing, ids_BQ: Tensor) -> LayerCall:
        plan = None
        if routing.plans is not None:
            plan = routing.plans[layer if len(routing.plans) > 1 else 0]
        first = routing.first_token
        token_T = torch.arange(first, first + ids_BQ.numel(), device=ids_BQ.device)
        rate = self.config.dropout if self.training else 0.0
        return LayerCall(routing.k, plan, token_T, routing.dropout_seed, rate)
