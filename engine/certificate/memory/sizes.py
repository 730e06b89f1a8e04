"""The sizes that memory depends on: of a rank's micro-batch, of its rows, and of the parameters that it holds.

Letters: B streams, Q segment, M memory, S = M + Q, T = B * Q tokens, D width, H heads, W head width, V vocabulary, F
expert hidden width, L experts of a rank, N expert rows, R received rows, P ranks of an expert group.
"""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import ceil
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from foreroute.engine.certificate.counts.exact import StepStatistics
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.config import Config, KernelsConfig, ModelConfig, MoEConfig, NgramTablesConfig, to_plain
from foreroute.engine.config.enums import Backend, SavedForBackward
from foreroute.engine.model.adaptive import clusters
from foreroute.engine.model.transformer_xl import SMALL_VOCABULARY, TransformerXL
from foreroute.engine.optim.adam import comes_last
from foreroute.engine.routing.methods import has_live_gate, planned_methods
from foreroute.engine.routing.plans.exchange_choice import wire_itemsize
from foreroute.kernels.activations import saves_pre
from foreroute.kernels.ops.relative_attention import tile_shape


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one rank in one micro-batch, at most."""

    received: int  # of one layer (R); all tokens of the group by gather
    computed: int  # of one layer (N)
    received_all: int  # of all layers together
    computed_all: int
    expert: int  # of one expert


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of one rank's part of a micro-batch."""

    layout: Layout
    vocab: int
    streams: int  # B, of one rank and micro-batch
    k: int
    gpu: bool  # runs on a GPU, with the Triton kernels

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.layout.config

    @property
    def placement(self) -> Placement:
        """The run's ranks."""
        return self.layout.placement

    @property
    def tokens(self) -> int:
        """T."""
        return self.streams * self.config.data.segment

    @property
    def keys(self) -> int:
        """S, with the memory filled."""
        return self.config.model.memory + self.config.data.segment

    @property
    def inner(self) -> int:
        """H * W."""
        return self.config.model.heads * self.config.model.head_width

    @property
    def number(self) -> int:
        """Bytes of a number of the compute copy and of activations."""
        return self.layout.item_bytes

    @property
    def mask(self) -> int:
        """Bytes that a dropout mask keeps of each number: PyTorch keeps it as a number on a CPU, as a byte on a GPU."""
        if self.config.model.dropout == 0:
            return 0
        return 1 if self.gpu else self.number

    @property
    def output_layers(self) -> tuple[tuple[int, int], ...]:
        """Symbols and width of each layer whose logits the loss computes in chunks; none where it has all at once."""
        head, *tails = clusters(self.config.model, self.vocab)
        if not tails and self.vocab <= SMALL_VOCABULARY:
            return ()
        return (head.size + len(tails), head.width), *((tail.size, tail.width) for tail in tails)

    @property
    def wire(self) -> int:
        """Bytes of a number between ranks."""
        return wire_itemsize(self.config.parallel, self.config.train.precision)

    @property
    def shared_out(self) -> bool:
        """Whether rows travel."""
        return self.placement.expert_ranks > 1

    @property
    def gather(self) -> bool:
        """Whether all rows go to all ranks."""
        return self.layout.gathers(self.k, self.tokens)

    @property
    def chunks(self) -> int:
        """Chunks of a micro-batch that are exchanged one after the other."""
        return min(self.config.parallel.chunks, self.tokens) if self.shared_out else 1

    @property
    def gated(self) -> bool:
        """Whether experts have a gate."""
        return self.config.moe.activation.gated

    @property
    def saves_pre(self) -> bool:
        """Whether experts save the pre-activation, and make the hidden units again in backward."""
        return saves_pre(self.config.moe.activation.function, gated=self.gated)

    def dense_numbers(self, *, dropout: bool) -> int:
        """Numbers that a dense feed-forward keeps of each hidden unit, besides a mask.

        These are the hidden units, for a gate both factors, and z unless ReLU keeps its result instead. Dropout's
        result is kept in place of the hidden units, but for ReLU's own.
        """
        relu = self.config.moe.activation.function == "relu"
        if self.gated:
            return 3 if relu else 4
        return 1 if relu and not dropout else 2

    @property
    def masked(self) -> bool:
        """Whether all rows go through all experts of the rank, as on a CPU for k near E.

        A run measures kernels.masked_from_k when it starts; where it is not set, rows are taken as grouped.
        """
        from_k = self.config.kernels.masked_from_k
        return not self.gpu and from_k is not None and self.k >= from_k

    @property
    def fast(self) -> bool:
        """Whether the gathered token rows are kept."""
        return not self.gpu and not self.masked and self.config.kernels.mode is SavedForBackward.fast

    @property
    def gate(self) -> bool:
        """Whether a learned gate weighs the planned experts, in any layer."""
        return any(map(has_live_gate, self.config.expert_sections))

    @property
    def listed(self) -> int:
        """Experts of a token, at most, of all kinds."""
        at_most_k = all(method.at_most_k for method in planned_methods(self.config.model, self.config.moe))
        return self.k if at_most_k else self.columns

    @property
    def columns(self) -> int:
        """Experts of all kinds of the layer that has the most."""
        return max(section.columns for section in self.config.expert_sections)

    @property
    def zero_experts(self) -> bool:
        """Whether there are experts that compute without a row."""
        return self.config.moe.constant_experts + self.config.moe.copy_experts > 0

    @property
    def local_experts(self) -> int:
        """L."""
        return self.layout.local_experts

    @property
    def tile(self) -> tuple[int, int]:
        """Streams and queries of a tile of attention."""
        queries = self.config.data.segment
        return tile_shape(self.streams, queries, self.keys, item_bytes=self.number, gpu=self.gpu)

    @property
    def pairs(self) -> int:
        """Query-key pairs of one stream and head that attention computes: block by block, all keys up to the block's
        end."""
        segment, memory = self.config.data.segment, self.config.model.memory
        _, block = self.tile
        ends = [min(start + block, segment) for start in range(0, segment, block)]
        starts = [0, *ends[:-1]]
        return sum((end - start) * (memory + end) for start, end in zip(starts, ends, strict=True))


def runs_on_gpu(backend: Backend, device_memory_bytes: int | None) -> bool:
    """Return whether a run is certified for a GPU: it asks for Triton, or leaves the choice and a device is named."""
    return backend is Backend.triton or (backend is Backend.auto and device_memory_bytes is not None)


def exact_rows(of_k: StepStatistics, sizes: Sizes) -> Rows:
    """Take the exact maxima of one k."""
    if not sizes.layout.expert_layers:
        return Rows(0, 0, 0, 0, 0)
    received, all_layers = of_k.received_rows.max, of_k.received_layers.max
    if sizes.gather or not sizes.shared_out:
        received = sizes.placement.expert_ranks * sizes.tokens
        all_layers = sizes.layout.expert_layers * received
    return Rows(
        received=received,
        computed=of_k.computed_rows.max,
        received_all=all_layers,
        computed_all=of_k.computed_layers.max,
        expert=of_k.expert_rows.max,
    )


def bounded_rows(known: Rows, sizes: Sizes, known_streams: int) -> Rows:
    """Bound the rows at another number of streams (see engine/certificate/memory/peak.py)."""
    if not sizes.layout.expert_layers:
        return known
    times = ceil(sizes.streams / known_streams)
    layers, group = sizes.layout.expert_layers, sizes.placement.expert_ranks * sizes.tokens
    chosen = group * min(sizes.listed, sizes.local_experts)
    received = min(times * known.received, group)
    if sizes.gather or not sizes.shared_out:
        received = group
    return Rows(
        received=received,
        computed=min(times * known.computed, chosen),
        received_all=layers * received
        if sizes.gather or not sizes.shared_out
        else min(times * known.received_all, layers * group),
        computed_all=min(times * known.computed_all, layers * chosen),
        expert=min(times * known.expert, group),
    )


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters whose optimizer state is shared out over the same ranks."""

    name: str
    numels: tuple[int, ...]  # of each parameter on this rank, in the order of flat buffers
    ranks: int  # that hold the same parameters, and a part of their state each

    @property
    def numbers(self) -> int:
        """All parameters."""
        return sum(self.numels)

    @property
    def part(self) -> int:
        """One rank's part."""
        return ceil(self.numbers / self.ranks)

    @property
    def touched(self) -> int:
        """Numbers of the parameters of which a rank's part has a piece, of the rank with the most."""
        ends = list(accumulate(self.numels))
        found = []
        for rank in range(self.ranks):
            start, stop = rank * self.part, (rank + 1) * self.part
            found.append(
                sum(numel for numel, end in zip(self.numels, ends, strict=True) if end > start and end - numel < stop)
            )
        return max(found)


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters that a rank holds."""

    groups: tuple[Group, ...]  # all, or without experts and experts
    blocks: tuple[int, ...]  # numbers of each block
    inner: tuple[int, ...]  # of them of its experts, or of its dense feed-forward
    layer_experts: int  # of the experts of the layer that has the most
    at_input: int  # of tables at the input
    head: int  # outside the blocks and these tables
    embedding: int  # of them of the symbols' embeddings

    @property
    def numbers(self) -> int:
        """All of them."""
        return sum(group.numbers for group in self.groups)

    @property
    def layer(self) -> int:
        """Numbers of the largest block."""
        return max(self.blocks)

    @property
    def part(self) -> int:
        """Numbers whose optimizer state the rank holds."""
        return sum(group.part for group in self.groups)

    @property
    def touched(self) -> int:
        """Numbers of the parameters of which the rank's part has a piece, of the rank with the most."""
        return sum(group.touched for group in self.groups)

    @property
    def largest(self) -> int:
        """Numbers of the largest parameter."""
        return max(max(group.numels) for group in self.groups)


def count_parameters(layout: Layout, vocab_size: int) -> Parameters:
    """Count the parameters of a rank from the model itself, built without memory."""
    config, placement = layout.config, layout.placement
    dense: list[int] = []
    experts: list[int] = []
    blocks, inner = [0] * config.model.layers, [0] * config.model.layers
    layer_experts, at_input, embedding = Counter[str](), 0, 0
    sections = (_key(section) for section in (config.model, config.moe, config.ngram_tables))
    for name, numel in _numels(*sections, vocab_size):
        is_expert = ".experts." in name
        if is_expert:
            numel //= placement.expert_ranks
        (experts if is_expert and placement.expert_ranks > 1 else dense).append(numel)
        if name.startswith("blocks."):
            number = int(name.split(".")[1])
            blocks[number] += numel
            inner[number] += numel * (is_expert or ".feed_forward." in name)
            layer_experts[name.partition(".experts.")[0]] += numel * is_expert
        at_input += numel * name.startswith("input_tables.")
        embedding += numel * name.startswith("embedding.")
    groups = [Group("all", _laid_out(dense), placement.world_size)]
    if experts:
        groups = [Group("without experts", _laid_out(dense), placement.world_size)]
        groups.append(Group("experts", _laid_out(experts), placement.groups))
    most_experts = max(layer_experts.values())
    head = sum(group.numbers for group in groups) - sum(blocks) - at_input
    return Parameters(tuple(groups), tuple(blocks), tuple(inner), most_experts, at_input, head, embedding)


def _key(section: ModelConfig | MoEConfig | NgramTablesConfig) -> str:
    """Return a section's values as a key of a cache, from which it can be made again."""
    return json.dumps(to_plain(section))


def _laid_out(numels: list[int]) -> tuple[int, ...]:
    """Sizes in the order of flat buffers."""
    return tuple(sorted(numels, key=comes_last))


class _NoValues(TorchFunctionMode):
    """Leaves out initial values: without memory there are none, and PyTorch would load its compiler to draw them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor to be drawn as it is; call everything else."""
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@cache
def _numels(model: str, moe: str, tables: str, vocab_size: int) -> list[tuple[str, int]]:
    """List each parameter of a model of all experts by its name, with its size."""
    with torch.device("meta"), _NoValues():
        sections = ModelConfig(**json.loads(model)), MoEConfig(**json.loads(moe))
        ngram_tables = NgramTablesConfig(**json.loads(tables))
        built = TransformerXL(*sections, KernelsConfig(), vocab_size, ngram_tables=ngram_tables)
    return [(name, parameter.numel()) for name, parameter in built.named_parameters()]
