"""Memory that a forward pass keeps for backward, and that backward needs on top, on one rank.

Follows engine/model/block.py, engine/model/attention.py, engine/moe/ and the two backends of kernels/. Backward
releases what it kept layer by layer, so it is greatest in the last layer or, where gradients weigh more, in the first.
Sums over layers are exact maxima (engine/certificate/counts/exact.py), so they are reached at most once in a run.

Letters: as in engine/certificate/memory/sizes.py.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from foreroute.engine.certificate.memory.sizes import Rows, Sizes
from foreroute.engine.certificate.memory.terms import Term, largest, term
from foreroute.engine.config.enums import Gate
from foreroute.engine.config.model import feed_forward_width
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
        layers, micro = config.model.layers, config.train.accumulation
        shape = f"{s.streams} streams x {positions} positions x {config.model.width} width x {s.number} bytes"
        found = [term("memory", f"{micro} micro-batches x {layers} layers x {shape}")]
        return [*found, term("memory", f"{layers} new layers x {shape}")] if new else found

    def ends(self) -> list[Term]:
        """List the tensors that are kept outside the blocks."""
        s, model = self.sizes, self.sizes.config.model
        formulas = [
            f"{s.tokens} tokens x {model.width} width x {s.number + 2 * s.mask} bytes",
            f"{s.keys} distances x {model.width} width x {s.number + s.mask} bytes",
        ]
        if model.pre_norm:
            formulas.append(f"{s.tokens} tokens x {model.width} width x {s.number} bytes")
        if model.cutoffs:
            formulas.append(f"{len(s.output_layers)} clusters x {s.tokens} tokens x 9 bytes")
        if model.cutoffs and model.div_val > 1:
            widths = sum(width for _, width in s.output_layers)
            formulas.append(f"{s.tokens} tokens x {widths} widths x {s.number} bytes")
        return [term("embedding and output", formula) for formula in formulas]

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
        return [term("logits and loss", f"{s.tokens} tokens x {s.vocab} symbols x {each} bytes")]

    def _chunked_loss(self, *, backward: bool) -> list[Term]:
        s, c = self.sizes, self.sizes.number
        found: list[Term] = []
        at_once = []
        for symbols, width in s.output_layers:
            gradients = [
                term("loss in chunks", f"{symbols} symbols x {width + 1} numbers x {c} bytes"),
                term("loss in chunks", f"{s.tokens} tokens x {width} width x {c} bytes"),
            ]
            found += gradients
            tokens, wide = chunk_tokens(s.tokens, largest_chunk(width)), c == 2
            one_chunk = [
                term("loss in chunks", f"{tokens} tokens of a chunk x {symbols} symbols x {6 if wide else 4} bytes"),
                term("loss in chunks", f"{symbols} symbols x {width} numbers x {4 if wide else 0} bytes"),
            ]
            at_once.append(gradients if backward else one_chunk)
        return [*found, *largest(*at_once)]

    def kept(self, layers: int, *, attention_only: bool = False) -> list[Term]:
        """List the tensors that so many layers keep for backward.

        Args:
            attention_only: of the last of them, the experts' part is gone.
        """
        own = range(layers - attention_only)
        if self.sizes.config.train.recompute:  # of the last layer alone
            return [*self._inputs(layers), *self._attention(1), *self._after_attention(own[layers - 1 :])]
        return [*self._inputs(layers), *self._attention(layers), *self._after_attention(own)]

    def _after_attention(self, layers: range) -> list[Term]:
        """List the tensors of these layers' feed-forwards, with experts and without."""
        s, model, moe = self.sizes, self.sizes.config.model, self.sizes.config.moe
        dense = sorted(set(layers).difference(s.layout.blocks_with_experts))
        blocks = len(layers) - len(dense)
        experts, strata = blocks * moe.strata, blocks * (moe.strata - 1)
        kept = s.mask if model.pre_norm else s.number + s.mask
        rows = f"{s.tokens} tokens x {model.width} width"
        return [
            term("residual sums", f"{len(layers) + strata} layers x {rows} x {kept} bytes"),
            *([term("strata", f"{strata} strata x {rows} x {s.number} bytes")] if strata else []),
            *(self._around_experts(experts) if experts else []),
            *(self._experts(experts) if experts else []),
            *(self._feed_forward(dense) if dense else []),
        ]

    def _feed_forward(self, layers: Sequence[int]) -> list[Term]:
        """List the tensors of the dense feed-forwards of these layers (engine/moe/feed_forward.py)."""
        s, each = self.sizes, self.sizes.dense_numbers(dropout=bool(self.sizes.mask)) * self.sizes.number
        inputs = f"{len(layers)} layers x {s.tokens} tokens x {s.config.model.width} width x {s.number} bytes"
        found = [term("feed-forward", inputs)]
        for units, number in Counter(map(self._hidden_units, layers)).items():
            rows = f"{number} layers x {s.tokens} tokens"
            found.append(term("feed-forward", f"{rows} x {units} hidden units x {each + s.mask} bytes"))
        return found

    def _hidden_units(self, layer: int) -> int:
        """Return the width of a layer's dense feed-forward."""
        return feed_forward_width(self.sizes.config.model, self.sizes.config.moe, layer)

    def feed_forward_backward(self, layer: int) -> list[Term]:
        """List the tensors of a layer's dense feed-forward in backward, without gradients of parameters.

        With dropout, what it kept is gone before the second gradient of the hidden units is there.
        """
        s, config = self.sizes, self.sizes.config
        name, copies = "feed-forward's backward", 1 if s.mask else 2
        return [
            term(name, f"{s.tokens} tokens x {config.model.width} width x {2 * s.number} bytes"),
            term(name, f"{s.tokens} tokens x {self._hidden_units(layer)} hidden units x {copies * s.number} bytes"),
        ]

    def _inputs(self, layers: int) -> list[Term]:
        """List the inputs of blocks, if they are not there as memory."""
        s = self.sizes
        if self._memory_is_view or (s.config.model.pre_norm and not s.config.train.recompute):
            return []
        formula = f"{layers} layers x {s.tokens} tokens x {s.config.model.width} width x {s.number} bytes"
        return [term("inputs of layers", formula)]

    def _attention(self, layers: int) -> list[Term]:
        s, model, c = self.sizes, self.sizes.config.model, self.sizes.number
        positions, each_pair = s.streams * s.keys, c + (model.attention_dropout > 0)
        weights = f"{s.streams} streams x {model.heads} heads x {s.pairs} query-key pairs x {each_pair} bytes"
        formulas = [
            f"{s.tokens} tokens x {s.inner} head widths x {3 * c} bytes",
            f"{positions} positions x {s.inner} head widths x {2 * c} bytes",
            f"{s.keys + 1} distances x {s.inner} head widths x {c} bytes",
            f"{s.tokens} tokens x {model.heads} heads x 4 bytes",
            f"{positions} positions x {model.width} width x {2 * c if model.pre_norm else c} bytes",
            *([f"{s.tokens} tokens x {model.width} width x {c} bytes"] if model.pre_norm else []),
        ]
        return [
            term("attention weights", f"{layers} layers x {weights}"),
            *(term("attention", f"{layers} layers x {formula}") for formula in formulas),
            term("residual sums", f"{layers} layers x {s.tokens} tokens x {model.width} width x {c + s.mask} bytes"),
        ]

    def _around_experts(self, layers: int) -> list[Term]:
        """List the tensors of the dense parts of the expert layer."""
        s, config = self.sizes, self.sizes.config
        width, c, shared, constants = config.model.width, s.number, config.moe.shared_width, config.moe.constant_experts
        rows = f"{layers} layers x {s.tokens} tokens"
        found: list[Term] = []
        if not s.shared_out or shared or s.zero_experts:
            found.append(term("experts' input", f"{rows} x {width} width x {c} bytes"))
        if shared:
            each = s.dense_numbers(dropout=bool(s.mask)) * c + bool(s.mask)  # its mask is ours: a byte anywhere
            found.append(term("shared expert", f"{rows} x {shared} hidden units x {each} bytes"))
        if config.moe.residual:  # what both are multiplied by their coefficients
            found.append(term("residual", f"{rows} x {width} width x {2 * c} bytes"))
        if s.zero_experts:
            wide = 4 if c == 2 and constants else 0
            found.append(term("experts without rows", f"{rows} x {width} width x {wide} bytes"))
            found.append(term("experts without rows", f"{rows} x {constants} constants x 20 bytes"))
        return found

    def _gate(self, received: int, computed: int) -> list[Term]:
        """List the tensors of live weights; in chunks they are made again in backward."""
        s = self.sizes
        found = [term("gate", f"{computed} expert rows x 4 bytes")]
        if s.chunks > 1:
            return found
        each = 4 if s.config.moe.gate is Gate.softmax else 16
        found.append(term("gate", f"{received} rows x {s.listed} experts of a set x {each} bytes"))
        if s.number == 2:
            found.append(term("gate", f"{received} rows x {s.config.model.width} width x 4 bytes"))
        return found

    def _experts(self, layers: int) -> list[Term]:
        s, moe, rows = self.sizes, self.sizes.config.moe, self.rows
        width, c = s.config.model.width, s.number
        received = min(layers * rows.received, rows.received_all)
        computed = min(layers * rows.computed, rows.computed_all)
        through = f"{received} rows x {s.local_experts} experts" if s.masked else f"{computed} expert rows"
        each = 2 * c if s.gated else c
        found = [term("experts' hidden units", f"{through} x {moe.expert_width} hidden units x {each} bytes")]
        if s.fast:
            found.append(term("experts' input", f"{computed} expert rows x {width} width x {c} bytes"))
        if s.shared_out:
            found.append(term("received rows", f"{received} rows x {width} width x {c} bytes"))
            if s.config.model.dropout and not (s.gather and s.chunks == 1):
                found.append(term("received rows", f"{received} numbers of tokens x 8 bytes"))
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
        rows = [
            f"{s.tokens} tokens x {width} width x {2 * c} bytes",
            f"{received} rows x {width} width x {2 * c if s.shared_out else c} bytes",
        ]
        units = moe.expert_width
        if s.masked:
            units *= s.local_experts
            rows.append(f"{received} rows x {units} hidden units x {(3 if s.gated else 1 + s.saves_pre) * c} bytes")
            if s.saves_pre:
                block, each = min(received, BLOCK_ROWS), (3 if s.gated else 2) * c
                rows.append(f"{block} rows of a block x {units} hidden units x {each} bytes")
        elif s.gpu:
            rows.append(f"{computed} expert rows x {units} hidden units x {(3 if s.gated else 2) * c} bytes")
            rows.append(f"{computed} expert rows x {width} width x {c} bytes")
        else:
            each = (4 if s.gated else 1 + s.saves_pre) * c
            rows.append(f"{expert} rows of an expert x {units} hidden units x {each} bytes")
            rows.append(f"{computed} expert rows x {width} width x {(2 if s.fast else 3) * c} bytes")
            rows.append(f"{computed} expert rows x 24 bytes of indices")
        found = [term("experts' backward", formula) for formula in rows]
        if s.chunks > 1:  # the next chunk's rows, and results that wait
            found.append(term("rows on their way", f"{received} rows x {width} width x {c + s.wire} bytes"))
            found.append(term("rows on their way", f"{s.tokens} tokens x {width} width x {c} bytes"))
        if s.chunks > 1 and s.gate:
            found.append(term("gate", f"{received} rows x {width} width x {8 if c == 2 else c} bytes"))
            found.append(term("gate", f"{received} rows x {s.columns} experts x 8 bytes"))
        return found

    def attention_backward(self) -> list[Term]:
        """List the tensors of one layer's attention in backward."""
        s = self.sizes
        positions, c = s.streams * s.keys, s.number
        together, queries = s.tile
        formulas = [
            f"{s.tokens} tokens x {s.config.model.width} width x {2 * c} bytes",
            f"{s.tokens} tokens x {s.inner} head widths x {4 * c} bytes",
            f"{positions} positions x {s.inner} head widths x {2 * c} bytes",
            f"{s.keys + 1} distances x {s.inner} head widths x 4 bytes",
            f"2 tiles x {together} streams x {queries} queries x {s.keys + 1} keys x {c} bytes",
        ]
        return [term("attention's backward", formula) for formula in formulas]

    @property
    def _memory_is_view(self) -> bool:
        return self.sizes.config.model.memory <= self.sizes.config.data.segment
