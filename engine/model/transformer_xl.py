"""Transformer-XL (arXiv 1901.02860): tied embedding, blocks with segment memory, loss in nats.

As in the public code: embeddings times sqrt(D), dropout on embeddings, encoded distances and the final hidden state, u
and v shared by all layers. A final LayerNorm is added for pre-LN. Memory is a value: it comes in and goes out. The
logits of many symbols are never there for all tokens at once, but for routing with a second pass. Parameter names are
checkpoint keys.

Letters: B streams, Q query length, M memory length (m <= M of it filled), S = m+Q, D model width, V vocabulary,
H heads, W head width, L expert layers here, E experts, t tables at the input.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foreroute.engine.config import KernelsConfig, ModelConfig, MoEConfig, NgramTablesConfig
from foreroute.engine.model.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from foreroute.engine.model.attention import SharedAttention, encode_distances
from foreroute.engine.model.block import Block, BlockOutput, join_counts
from foreroute.engine.model.input_tables import input_tables
from foreroute.engine.moe import kept_plans
from foreroute.engine.moe.experts import Experts
from foreroute.engine.moe.layer import share_routers
from foreroute.engine.ngram_tables.entries import EntryOutput
from foreroute.engine.ngram_tables.tables import NgramTables
from foreroute.engine.routing.losses import consistency_loss
from foreroute.engine.routing.plan import Routing
from foreroute.engine.routing.plans.row_plan import TableKeys
from foreroute.kernels.ops.linear_cross_entropy import CrossEntropy, linear_cross_entropy

SMALL_VOCABULARY = 1024
"""Symbols up to which the loss computes all logits of a micro-batch at once."""

Memory = tuple[Tensor, ...]
"""Each layer's input at the newest m positions, [B, m, D], detached; then what the entry of each n-gram table keeps."""


class AttentionOptions(TypedDict, total=False):
    """How far attention sees; TransformerXL.hidden describes each field."""

    memory_len: int | None
    clamp_len: int
    same_length: bool


class Output(NamedTuple):
    """Result of a forward pass with targets."""

    loss: Tensor  # fp32 scalar: mean nats, of two passes their sum, plus auxiliary losses
    auxiliary_loss: Tensor  # fp32 scalar, detached: the part of the loss that is not nats
    nll_BQ: Tensor  # fp32, detached: nats of each target, of two passes their mean
    memory: Memory  # for the next segment; of two passes the first one's
    count_LE: Tensor | None
    """int64: rows of each layer's experts, of all passes, and 0 after the last of a layer that has fewer than others;
    None when dense."""


class Logits(NamedTuple):
    """Result of a forward pass without targets."""

    logits_BQV: Tensor  # in the model's dtype; by clusters, logarithms of probabilities
    memory: Memory
    auxiliary_loss: Tensor  # fp32 scalar
    count_LE: Tensor | None  # as in Output


class Hidden(NamedTuple):
    """Result of a forward pass up to the output layer."""

    hidden_BQD: Tensor  # after the final norm and dropout
    memory: Memory
    auxiliary_loss: Tensor  # fp32 scalar
    count_LE: Tensor | None  # as in Output


class TransformerXL(nn.Module):
    """The language model."""

    recompute: bool = False
    """Activation checkpointing: keep one tensor per block, compute the rest again in backward."""

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        kernels: KernelsConfig,
        vocab_size: int,
        *,
        seed: int = 0,
        ngram_tables: NgramTablesConfig | None = None,
    ) -> None:
        """Build the model with random weights.

        Args:
            seed: of the tables, for models that read table rows.
            ngram_tables: tables of n-grams, if the model has any.
        """
        super().__init__()
        self.config = model
        self.consistency = moe.consistency
        self.embedding: nn.Embedding | AdaptiveEmbedding
        self.output: AdaptiveSoftmax | None = None
        if model.cutoffs:
            self.embedding, self.output = AdaptiveEmbedding(model, vocab_size), AdaptiveSoftmax(model, vocab_size)
        else:
            self.embedding = nn.Embedding(vocab_size, model.width)
            self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        self.u = nn.Parameter(torch.empty(model.heads, model.head_width))
        self.v = nn.Parameter(torch.empty(model.heads, model.head_width))
        self.blocks = nn.ModuleList(Block(model, moe, kernels, i) for i in range(model.layers))
        share_routers(self)
        self.final_norm = nn.LayerNorm(model.width) if model.pre_norm else nn.Identity()
        ngram_tables = ngram_tables or NgramTablesConfig()
        self.input_tables = input_tables(model, moe, ngram_tables, vocab_size, seed)
        self.ngram_tables: NgramTables | None = None
        if ngram_tables.places:
            self.ngram_tables = NgramTables(
                ngram_tables,
                width=model.width,
                inner=model.heads * model.head_width,
                vocab_size=vocab_size,
                seed=seed,
                init_std=model.init_std,
            )
        self.dropout = nn.Dropout(model.dropout)
        self.init_weights(model.init_std)

    @property
    def table_keys(self) -> tuple[TableKeys, ...]:
        """How n-grams find their rows in all tables, the whole one at the input last, for plan_rows."""
        shared = () if self.ngram_tables is None else self.ngram_tables.keys
        return shared if self.input_tables is None else (*shared, self.input_tables.keys)

    @property
    def num_parameters(self) -> int:
        """Parameters, those of all experts here and the rows of n-gram tables on all ranks among them."""
        rows = 0 if self.ngram_tables is None else self.ngram_tables.num_parameters
        return rows + sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_unread(self) -> int:
        """Of these, numbers in n-gram tables that a symbol does not read."""
        return sum(tables.num_unread for tables in (self.ngram_tables, self.input_tables) if tables is not None)

    def init_weights(self, std: float) -> None:
        """Draw weights, u and v from N(0, std^2), LayerNorm gains from N(1, std^2); biases are zero."""
        nn.init.normal_(self.u, 0.0, std)
        nn.init.normal_(self.v, 0.0, std)
        for module in self.modules():
            if isinstance(module, Experts):
                module.init_weights(std)
            elif isinstance(module, AdaptiveEmbedding | AdaptiveSoftmax):
                module.init_weights()
            elif isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
                mean = 1.0 if isinstance(module, nn.LayerNorm) else 0.0
                nn.init.normal_(module.weight, mean, std)
                if isinstance(bias := getattr(module, "bias", None), Tensor):
                    nn.init.zeros_(bias)

    def forward(
        self,
        ids_BQ: Tensor,
        targets_BQ: Tensor,
        memory: Sequence[Tensor] | None,
        routing: Routing,
        **options: Unpack[AttentionOptions],
    ) -> Output:
        """Predict each target from the ids up to its place; arguments as for `hidden`.

        With a second routing there is a second pass, with dropout of its own, and the loss is that of THOR (Zuo et al.,
        ICLR 2022, arXiv 2110.04260): both cross-entropies plus moe.consistency times what the passes differ in.
        """
        if routing.second is not None:
            return self._two_passes(ids_BQ, targets_BQ, memory, (routing, routing.second), options)
        hidden_BQD, memory, auxiliary_loss, count_LE = self.hidden(ids_BQ, memory, routing, **options)
        loss, nll_T = self._cross_entropy(hidden_BQD, targets_BQ, routing)
        nll_BQ = nll_T.detach().view(targets_BQ.shape)
        return Output(loss + auxiliary_loss, auxiliary_loss.detach(), nll_BQ, memory, count_LE)

    def _cross_entropy(self, hidden_BQD: Tensor, targets_BQ: Tensor, routing: Routing) -> CrossEntropy:
        """Mean nats of the targets, and those of each."""
        target_T = targets_BQ.flatten()
        if isinstance(self.embedding, AdaptiveEmbedding):
            assert self.output is not None
            hidden_TD = hidden_BQD.flatten(0, 1)
            adaptive: CrossEntropy = self.output(hidden_TD, target_T, self.embedding, routing.tail_tokens)
            return adaptive
        if self.embedding.num_embeddings > SMALL_VOCABULARY:
            hidden_TD, scale = hidden_BQD.flatten(0, 1), 1 / max(1, len(target_T))
            return linear_cross_entropy(hidden_TD, self.embedding.weight, self.output_bias, target_T, scale=scale)
        nll_T = self._plain_nll(self.output_logits(hidden_BQD), target_T)
        return CrossEntropy(nll_T.mean(), nll_T)

    def _two_passes(
        self,
        ids_BQ: Tensor,
        targets_BQ: Tensor,
        memory: Sequence[Tensor] | None,
        routings: tuple[Routing, Routing],
        options: AttentionOptions,
    ) -> Output:
        first, second = (self.logits(ids_BQ, memory, routing, **options) for routing in routings)
        nll_T, second_nll_T = (self._plain_nll(out.logits_BQV, targets_BQ.flatten()) for out in (first, second))
        differ = consistency_loss(*(out.logits_BQV.flatten(0, 1) for out in (first, second)))
        auxiliary_loss = first.auxiliary_loss + second.auxiliary_loss + self.consistency * differ
        loss = nll_T.mean() + second_nll_T.mean()
        nll_T = (nll_T + second_nll_T) / 2
        count_LE = first.count_LE
        if count_LE is not None and second.count_LE is not None:
            count_LE = count_LE + second.count_LE
        return Output(
            loss + auxiliary_loss,
            auxiliary_loss.detach(),
            nll_T.detach().view(targets_BQ.shape),
            first.memory,
            count_LE,
        )

    @staticmethod
    def _plain_nll(logits_BQV: Tensor, target_T: Tensor) -> Tensor:
        return F.cross_entropy(logits_BQV.float().flatten(0, 1), target_T, reduction="none")

    def logits(
        self, ids_BQ: Tensor, memory: Sequence[Tensor] | None, routing: Routing, **options: Unpack[AttentionOptions]
    ) -> Logits:
        """Compute the logits of the next id at every place; arguments as for `hidden`."""
        hidden_BQD, memory, auxiliary_loss, count_LE = self.hidden(ids_BQ, memory, routing, **options)
        return Logits(self.output_logits(hidden_BQD), memory, auxiliary_loss, count_LE)

    def output_logits(self, hidden_BQD: Tensor) -> Tensor:
        """Compute the logits, [B, Q, V], that hidden states give; by clusters, the logarithms of probabilities."""
        if isinstance(self.embedding, AdaptiveEmbedding):
            assert self.output is not None
            return self.output.log_probabilities(hidden_BQD, self.embedding)
        return F.linear(hidden_BQD, self.embedding.weight, self.output_bias)

    def hidden(
        self,
        ids_BQ: Tensor,
        memory: Sequence[Tensor] | None,
        routing: Routing,
        *,
        memory_len: int | None = None,
        clamp_len: int = 0,
        same_length: bool = False,
    ) -> Hidden:
        """Compute the hidden state at every place.

        Args:
            memory: of the previous segment; None or empty at the start of a text.
            routing: with routing.position_BQ each place sees nothing before its document, neither here nor in memory.
            memory_len: positions that the returned memory holds at most (M); None means the model's own.
            clamp_len: distances beyond this count as this; 0 for no clamp.
            same_length: let each query see exactly M positions, itself included (fewer while memory fills up).
        """
        limit = self.config.memory if memory_len is None else memory_len
        if self.ngram_tables is not None:
            self.ngram_tables.fetch(routing.row_plans)
        x_BQD = self.embedding(ids_BQ)
        if self.input_tables is not None:
            x_BQD = self.input_tables(x_BQD, routing.landed_BQH[-1])
        number = len(self.blocks)
        kept = (memory or ())[number:]
        x_BQD = self._enter(None, x_BQD, routing, kept, limit).x_BQD
        x_BQD = self.dropout(x_BQD * self.config.width**0.5)
        memory = (memory or (x_BQD.new_empty(x_BQD.shape[0], 0, x_BQD.shape[2]),) * number)[:number]
        distance_SD = encode_distances(
            memory[0].shape[1] + ids_BQ.shape[1], self.config.width, clamp_len=clamp_len, like=x_BQD
        )
        window = limit if same_length else None
        first_BQ = None if routing.position_BQ is None else first_keys(routing.position_BQ, memory[0].shape[1])
        shared = SharedAttention(self.dropout(distance_SD), self.u, self.v, window, first_BQ)
        new_memory, new_kept, outputs, carried = list[Tensor](), list[Tensor](), list[BlockOutput](), None
        for layer, (block, memory_BmD) in enumerate(zip(self.blocks, memory, strict=True)):
            entered = self._enter(layer, x_BQD, routing, kept, limit)
            new_kept += [] if entered.kept is None else [entered.kept]
            new_memory.append(extend_memory(memory_BmD, entered.x_BQD, limit))
            inputs = entered.x_BQD, memory_BmD, shared, routing, carried, entered.value_BSI
            outputs.append(self._run(block, *inputs))
            x_BQD, carried = outputs[-1].y_BQD, outputs[-1].carried
        hidden_BQD = self.dropout(self.final_norm(x_BQD))
        losses = [out.auxiliary_loss.float() for out in outputs if out.auxiliary_loss is not None]
        counts = [out.count_SE for out in outputs if out.count_SE is not None]
        return Hidden(
            hidden_BQD,
            (*new_memory, *new_kept),
            torch.stack(losses).sum() if losses else hidden_BQD.new_zeros((), dtype=torch.float32),
            join_counts(counts) if counts else None,
        )

    def _enter(
        self, place: int | None, x_BQD: Tensor, routing: Routing, kept: Sequence[Tensor], limit: int
    ) -> EntryOutput:
        """Let the rows of the n-gram table at the model's input (None) or a layer's enter; memory then holds both."""
        if self.ngram_tables is None:
            return EntryOutput(x_BQD)
        return self.ngram_tables.enter(place, x_BQD, routing, kept, limit)

    def _run(self, block: nn.Module, *inputs: object) -> BlockOutput:
        output: BlockOutput
        if self.recompute and torch.is_grad_enabled():
            output = checkpoint(block, *inputs, use_reentrant=False, context_fn=kept_plans.contexts)
        else:
            output = block(*inputs)
        return output


def first_keys(position_BQ: Tensor, memory: int) -> Tensor:
    """Return the first key of each query's document, int32 [B, Q], among `memory` keys and those of the Q queries.

    Args:
        position_BQ: int32, ids of the same document before each query.

    Example: 2 keys of memory, and documents that start 1 id before the segment and at its third id: positions
    [[1, 2, 0, 1]] give first keys [[1, 1, 4, 4]].
    """
    own_Q = torch.arange(memory, memory + position_BQ.shape[1], dtype=torch.int32, device=position_BQ.device)
    return (own_Q - position_BQ).clamp(min=0)


def extend_memory(memory_BmD: Tensor, x_BQD: Tensor, limit: int) -> Tensor:
    """Return the newest `limit` positions, or all there are, of memory followed by x, detached."""
    missing = limit - x_BQD.shape[1]
    if missing <= 0:
        return x_BQD[:, -missing:].detach()
    old_BmD = memory_BmD[:, max(0, memory_BmD.shape[1] - missing) :]
    return torch.cat((old_BmD, x_BQD), dim=1).detach()
