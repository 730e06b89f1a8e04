"""Memory that a forward pass keeps for backward, and that backward needs on top, on one rank.

Follows engine/model/block.py, engine/model/attention.py, engine/moe/ and the two backends of kernels/. Backward
releases what it kept layer by layer, so it is greatest in the last layer or, where gradients weigh more, in the first.
Sums over layers are exact maxima (engine/certificate/counts/exact.py), so they are reached at most once in a run.

Letters: as in engine/certificate/memory/sizes.py.
"""

from dataclasses import dataclass
from math import ceil

from foreroute.engine.certificate.memory.sizes import Rows, Sizes
from foreroute.engine.certificate.memory.terms import Term, largest, term
from foreroute.engine.config.enums import Gate
from foreroute.engine.config.model import expert_layers
from foreroute.kernels.cpu.masked_ffn import BLOCK_ROWS
from foreroute.kernels.ops.linear_cross_entropy import chunk_tokens, largest_chunk


@dataclass(frozen=True, slots=True)
class Activations:
    """Activations of a rank in one micro-batch."""

    sizes: Sizes
    rows: Rows

    def memory(self, *, new: bool) -> list[Term]:
        """List the Transformer-XL memory: of every micro-batch, and the one that this one makes.

        A memory no longer than the segment is a view of the layer's input, which stays whole.
        """
        s, config = self.sizes, self.sizes.config
        positions = config.data.segment if self._memory_is_view else config.model.memory
        shape = s.streams, positions, config.model.width, s.number
        times = config.train.accumulation
        words = "{} micro-batches x {} layers x {} streams x {} positions x {} width x {} bytes"
        found = [term("memory", words, times, config.model.layers, *shape)]
        if new:
            found.append(
                term(
                    "memory",
                    "{} new layers x {} streams x {} positions x {} width x {} bytes",
                    config.model.layers,
                    *shape,
                )
            )
        return found

    def ends(self) -> list[Term]:
        """List the tensors that are kept outside the blocks."""
        s, model = self.sizes, self.sizes.config.model
        masked = s.number + s.mask
        found = [
            term(
                "embedding and output", "{} tokens x {} width x {} bytes", s.tokens, model.width, s.number + 2 * s.mask
            ),
            term("embedding and output", "{} distances x {} width x {} bytes", s.keys, model.width, masked),
        ]
        if model.pre_norm:
            found.append(
                term("embedding and output", "{} tokens x {} width x {} bytes", s.tokens, model.width, s.number)
            )
        if model.cutoffs:
            number, narrow = len(s.output_layers), model.div_val > 1
            found.append(term("embedding and output", "{} clusters x {} tokens x {} bytes", number, s.tokens, 9))
            if narrow:
                widths = sum(width for _, width in s.output_layers)
                found.append(
                    term("embedding and output", "{} tokens x {} widths x {} bytes", s.tokens, widths, s.number)
                )
        return found

    def logits(self, *, backward: bool) -> list[Term]:
        """List the loss's tensors: logits, their fp32 copy and logarithms; in backward logarithms and two gradients.

        In chunks (kernels/ops/linear_cross_entropy.py) these are gradients and the logits of one chunk; in backward one
        layer's gradients are there twice.
        """
        s = self.sizes
        if s.output_layers:
            return self._chunked_loss(backward=backward)
        each = 4 + s.number + (4 if s.number == 2 else 0)
        if backward:
            each = 12 + (2 if s.number == 2 else 0)
        return [term("logits and loss", "{} tokens x {} symbols x {} bytes", s.tokens, s.vocab, each)]

    def _chunked_loss(self, *, backward: bool) -> list[Term]:
        s, c = self.sizes, self.sizes.number
        name, weights, states = (
            "loss in chunks",
            "{} symbols x {} numbers x {} bytes",
            "{} tokens x {} width x {} bytes",
        )
        found = []
        for symbols, width in s.output_layers:
            found += [term(name, weights, symbols, width + 1, c), term(name, states, s.tokens, width, c)]
        at_once = []
        for symbols, width in s.output_layers:
            if backward:
                at_once.append([term(name, weights, symbols, width + 1, c), term(name, states, s.tokens, width, c)])
                continue
            tokens = chunk_tokens(s.tokens, largest_chunk(width))
            logits = term(name, "{} tokens of a chunk x {} symbols x {} bytes", tokens, symbols, 6 if c == 2 else 4)
            at_once.append([logits, term(name, weights, symbols, width, 4 if c == 2 else 0)])
        return [*found, *largest(*at_once)]

    def kept(self, layers: int, *, attention_only: bool = False) -> list[Term]:
        """List the tensors that so many layers keep for backward.

        Args:
            attention_only: of the last of them, the experts' part is gone.
        """
        if self.sizes.config.train.recompute:
            return [*self._inputs(layers), *self._recomputed(layers, attention_only)]
        own = range(layers - attention_only)
        return [*self._inputs(layers), *self._attention(layers), *self._after_attention(own)]

    def _recomputed(self, layers: int, attention_only: bool) -> list[Term]:
        own = range(layers, layers) if attention_only else range(layers - 1, layers)
        return [*self._attention(1), *self._after_attention(own)]

    def _after_attention(self, layers: range) -> list[Term]:
        """List the tensors of these layers' feed-forwards, with experts and without."""
        model, moe = self.sizes.config.model, self.sizes.config.moe
        blocks = len(set(layers).intersection(expert_layers(model, moe)))
        experts, strata = blocks * moe.strata, blocks * (moe.strata - 1)
        words = "{} strata x {} tokens x {} width x {} bytes"
        return [
            *self._residual(len(layers) + strata),
            *([term("strata", words, strata, self.sizes.tokens, model.width, self.sizes.number)] if strata else []),
            *(self._around_experts(experts) if experts else []),
            *(self._experts(experts) if experts else []),
            *(self._feed_forward(len(layers) - blocks) if blocks < len(layers) else []),
        ]

    def _residual(self, layers: int) -> list[Term]:
        s, model = self.sizes, self.sizes.config.model
        after = s.mask if model.pre_norm else s.number + s.mask
        words = "{} layers x {} tokens x {} width x {} bytes"
        return [term("residual sums", words, layers, s.tokens, model.width, after)]

    def _feed_forward(self, layers: int) -> list[Term]:
        """List the tensors of dense feed-forwards (engine/moe/feed_forward.py)."""
        s, config = self.sizes, self.sizes.config
        each = s.dense_numbers(dropout=bool(s.mask)) * s.number + s.mask
        name, rows = "feed-forward", "{} layers x {} tokens x "
        return [
            term(name, rows + "{} width x {} bytes", layers, s.tokens, config.model.width, s.number),
            term(name, rows + "{} hidden units x {} bytes", layers, s.tokens, config.moe.plain_width, each),
        ]

    def feed_forward_backward(self) -> list[Term]:
        """List the tensors of one dense feed-forward in backward, without gradients of parameters.

        With dropout, what it kept is gone before the second gradient of the hidden units is there.
        """
        s, config = self.sizes, self.sizes.config
        name, copies = "feed-forward's backward", 1 if s.mask else 2
        return [
            term(name, "{} tokens x {} width x {} bytes", s.tokens, config.model.width, 2 * s.number),
            term(name, "{} tokens x {} hidden units x {} bytes", s.tokens, config.moe.plain_width, copies * s.number),
        ]

    def _inputs(self, layers: int) -> list[Term]:
        """List the inputs of blocks, if they are not there as memory."""
        s = self.sizes
        if self._memory_is_view or (s.config.model.pre_norm and not s.config.train.recompute):
            return []
        return [
            term(
                "inputs of layers",
                "{} layers x {} tokens x {} width x {} bytes",
                layers,
                s.tokens,
                s.config.model.width,
                s.number,
            )
        ]

    def _attention(self, layers: int) -> list[Term]:
        s, model = self.sizes, self.sizes.config.model
        positions, c = s.streams * s.keys, s.number
        found = [
            term(
                "attention weights",
                "{} layers x {} streams x {} heads x {} query-key pairs x {} bytes",
                layers,
                s.streams,
                model.heads,
                s.pairs,
                c + (model.attention_dropout > 0),
            ),
            term("attention", "{} layers x {} tokens x {} head widths x {} bytes", layers, s.tokens, s.inner, 3 * c),
            term(
                "attention", "{} layers x {} positions x {} head widths x {} bytes", layers, positions, s.inner, 2 * c
            ),
            term("attention", "{} layers x {} distances x {} head widths x {} bytes", layers, s.keys + 1, s.inner, c),
            term("attention", "{} layers x {} tokens x {} heads x {} bytes", layers, s.tokens, model.heads, 4),
            term(
                "attention",
                "{} layers x {} positions x {} width x {} bytes",
                layers,
                positions,
                model.width,
                2 * c if model.pre_norm else c,
            ),
            term(
                "residual sums",
                "{} layers x {} tokens x {} width x {} bytes",
                layers,
                s.tokens,
                model.width,
                c + s.mask,
            ),
        ]
        if model.pre_norm:
            found.append(
                term("attention", "{} layers x {} tokens x {} width x {} bytes", layers, s.tokens, model.width, c)
            )
        return found

    def _around_experts(self, layers: int) -> list[Term]:
        """List the tensors of the dense parts of the expert layer."""
        s, config = self.sizes, self.sizes.config
        width, c, shared = config.model.width, s.number, config.moe.shared_width
        found = list[Term]()
        if not s.shared_out or shared or s.zero_experts:
            found.append(
                term("experts' input", "{} layers x {} tokens x {} width x {} bytes", layers, s.tokens, width, c)
            )
        if shared:
            each = s.dense_numbers(dropout=bool(s.mask)) * c + bool(s.mask)  # its mask is ours: a byte anywhere
            found.append(
                term(
                    "shared expert",
                    "{} layers x {} tokens x {} hidden units x {} bytes",
                    layers,
                    s.tokens,
                    shared,
                    each,
                )
            )
        if config.moe.residual:  # what both are multiplied by their coefficients
            found.append(
                term("residual", "{} layers x {} tokens x {} width x {} bytes", layers, s.tokens, width, 2 * c)
            )
        if s.zero_experts:
            wide = 4 if c == 2 and config.moe.constant_experts else 0
            words = "{} layers x {} tokens x {} width x {} bytes"
            found.append(term("experts without rows", words, layers, s.tokens, width, wide))
            words = "{} layers x {} tokens x {} constants x {} bytes"
            found.append(term("experts without rows", words, layers, s.tokens, config.moe.constant_experts, 20))
        return found

    def _gate(self, received: int, computed: int) -> list[Term]:
        """List the tensors of live weights; in chunks they are made again in backward."""
        s = self.sizes
        found = [term("gate", "{} expert rows x {} bytes", computed, 4)]
        if s.chunks > 1:
            return found
        each = 4 if s.config.moe.gate is Gate.softmax else 16
        found.append(term("gate", "{} rows x {} experts of a set x {} bytes", received, s.listed, each))
        if s.number == 2:
            found.append(term("gate", "{} rows x {} width x {} bytes", received, s.config.model.width, 4))
        return found

    def _experts(self, layers: int) -> list[Term]:
        s, moe, rows = self.sizes, self.sizes.config.moe, self.rows
        width, c = s.config.model.width, s.number
        received = min(layers * rows.received, rows.received_all)
        computed = min(layers * rows.computed, rows.computed_all)
        products = 2 if s.gated else 1
        if s.masked:
            hidden = term(
                "experts' hidden units",
                "{} rows x {} experts x {} hidden units x {} bytes",
                received,
                s.local_experts,
                moe.expert_width,
                products * c,
            )
        else:
            hidden = term(
                "experts' hidden units",
                "{} expert rows x {} hidden units x {} bytes",
                computed,
                moe.expert_width,
                products * c,
            )
        found = [hidden]
        if s.fast:
            found.append(term("experts' input", "{} expert rows x {} width x {} bytes", computed, width, c))
        if s.shared_out:
            found.append(term("received rows", "{} rows x {} width x {} bytes", received, width, c))
            if s.config.model.dropout and not (s.gather and s.chunks == 1):
                found.append(term("received rows", "{} numbers of tokens x {} bytes", received, 8))
        return [*found, *self._gate(received, computed)] if s.gate else found

    def experts_backward(self) -> list[Term]:
        """List the tensors of one layer's experts in backward, without gradients of parameters.

        A chunk has its share of the rows, and perhaps a few more.
        """
        s, moe = self.sizes, self.sizes.config.moe
        width, c = s.config.model.width, s.number
        received, computed, expert = (
            ceil(rows / s.chunks) for rows in (self.rows.received, self.rows.computed, self.rows.expert)
        )
        found = [
            term("experts' backward", "{} tokens x {} width x {} bytes", s.tokens, width, 2 * c),
            term("experts' backward", "{} rows x {} width x {} bytes", received, width, 2 * c if s.shared_out else c),
        ]
        if s.chunks > 1:  # the next chunk's rows, and results that wait
            found.append(term("rows on their way", "{} rows x {} width x {} bytes", received, width, c + s.wire))
            found.append(term("rows on their way", "{} tokens x {} width x {} bytes", s.tokens, width, c))
            if s.gate:
                found.append(term("gate", "{} rows x {} width x {} bytes", received, width, 8 if c == 2 else c))
                found.append(term("gate", "{} rows x {} experts x {} bytes", received, s.columns, 8))
        if s.masked:
            units = s.local_experts * moe.expert_width
            copies = 3 if s.gated else 1 + s.saves_pre
            found.append(term("experts' backward", "{} rows x {} hidden units x {} bytes", received, units, copies * c))
            block = min(received, BLOCK_ROWS)
            if s.saves_pre:
                each = (3 if s.gated else 2) * c
                found.append(
                    term("experts' backward", "{} rows of a block x {} hidden units x {} bytes", block, units, each)
                )
        elif s.gpu:
            copies = 3 if s.gated else 2
            found.append(
                term(
                    "experts' backward",
                    "{} expert rows x {} hidden units x {} bytes",
                    computed,
                    moe.expert_width,
                    copies * c,
                )
            )
            found.append(term("experts' backward", "{} expert rows x {} width x {} bytes", computed, width, c))
        else:
            found.append(
                term(
                    "experts' backward",
                    "{} rows of an expert x {} hidden units x {} bytes",
                    expert,
                    moe.expert_width,
                    4 * c if s.gated else (1 + s.saves_pre) * c,
                )
            )
            found.append(
                term(
                    "experts' backward",
                    "{} expert rows x {} width x {} bytes",
                    computed,
                    width,
                    (2 if s.fast else 3) * c,
                )
            )
            found.append(term("experts' backward", "{} expert rows x {} bytes of indices", computed, 24))
        return found

    def attention_backward(self) -> list[Term]:
        """List the tensors of one layer's attention in backward."""
        s = self.sizes
        positions, c = s.streams * s.keys, s.number
        together, queries = s.tile
        return [
            term("attention's backward", "{} tokens x {} width x {} bytes", s.tokens, s.config.model.width, 2 * c),
            term("attention's backward", "{} tokens x {} head widths x {} bytes", s.tokens, s.inner, 4 * c),
            term("attention's backward", "{} positions x {} head widths x {} bytes", positions, s.inner, 2 * c),
            term("attention's backward", "{} distances x {} head widths x {} bytes", s.keys + 1, s.inner, 4),
            term(
                "attention's backward",
                "{} tiles x {} streams x {} queries x {} keys x {} bytes",
                2,
                together,
                queries,
                s.keys + 1,
                c,
            ),
        ]

    @property
    def _memory_is_view(self) -> bool:
        return self.sizes.config.model.memory <= self.sizes.config.data.segment
