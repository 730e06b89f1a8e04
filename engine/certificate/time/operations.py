"""Time of one rank's part of a step on a cluster, from its matrix products, bytes and operations.

The counts follow the code that runs: engine/model/transformer_xl.py, engine/model/attention.py,
kernels/ops/relative_attention.py, engine/moe, kernels/ and DeepSpeed's Adam. Products are exact; bytes of elementwise
operations and numbers of operations are counted by hand to about a fifth, which the cluster's scales take up where they
were measured.

Letters: B streams of a rank in a micro-batch, Q segment, M memory, S = M + Q, T = B x Q tokens, D width, H heads, W
head width, I = H x W, V vocabulary, L experts of a rank, F expert width, N computed expert rows, R received rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.time.cluster import ClusterConfig
from foreroute.engine.config import Backend, TrainConfig
from foreroute.engine.config.model import feed_forward_width
from foreroute.engine.model.flops import Product, count_matrices, end_products, projection_products, score_products
from foreroute.engine.routing.methods import has_live_gate
from foreroute.kernels.ops.relative_attention import tile_shape

Seconds = NDArray[np.float64]
RowCounts = NDArray[np.float64]

_BACKWARD = 2.0  # products, bytes and operations of backward against forward: two gradients for each product


@dataclass(frozen=True, slots=True)
class ModelSeconds:
    """One micro-batch through all layers, without what the experts compute; forward and backward."""

    attention: float
    rest: float
    operations: float


def passes(train: TrainConfig) -> float:
    """Return the forward passes that one forward and backward pass weighs; recomputation makes one more."""
    return 1 + _BACKWARD + (1 if train.recompute else 0)


def model_seconds(layout: Layout, cluster: ClusterConfig, vocab: int, shares: Sequence[float] = ()) -> ModelSeconds:
    """Model the time of one micro-batch outside the experts.

    Args:
        vocab: symbols (V).
        shares: of the symbols that each cluster has (engine/model/adaptive.py).
    """
    model, item, bf16 = layout.config.model, layout.item_bytes, layout.item_bytes == 2
    streams, queries, tokens = layout.streams, layout.config.data.segment, layout.tokens
    inner, width, keys = model.heads * model.head_width, model.width, queries + model.memory

    def seconds(*products: Product) -> float:
        return sum(product.count * float(cluster.product_seconds(product.flops, bf16=bf16)) for product in products)

    together, block = tile_shape(streams, queries, keys, item_bytes=item, gpu=not cluster.host_copies)
    tiles = model.heads * ceil(queries / block) * ceil(streams / together)
    projections = seconds(*projection_products(model, streams=streams, segment=queries))
    score_product = score_products(model, segment=queries, block=block, together=together, tiles=tiles)
    scores = seconds(score_product)
    score_bytes = 6 * item * streams * model.heads * queries * score_product.columns
    moved_bytes = item * (8 * tokens * inner + 6 * streams * keys * inner + 2 * streams * keys * width)
    attention = projections + scores + float(cluster.memory_seconds(score_bytes + moved_bytes))
    moe = layout.config.moe
    without_experts = set(range(model.layers)).difference(layout.blocks_with_experts)
    widths, matrices = (
        [feed_forward_width(model, moe, layer) for layer in without_experts],
        count_matrices(moe.activation),
    )
    dense = sum(seconds(Product(tokens, hidden, width, matrices)) for hidden in widths)
    residual = float(cluster.memory_seconds(20 * item * tokens * width))
    ends = end_products(model, vocab, tokens, shares)
    logits = sum(product.rows * product.columns for product in ends)
    loss = seconds(*ends) + float(cluster.memory_seconds((item + 16) * logits))
    operations = model.layers * (45 + 9 * tiles) + 25
    layers, weigh = model.layers, passes(layout.config.train)
    return ModelSeconds(
        attention=cluster.scale.attention * weigh * layers * attention,
        rest=cluster.scale.rest * (weigh * (layers * residual + dense) + (1 + _BACKWARD) * loss),
        operations=cluster.scale.operations * weigh * operations * cluster.operation_us * 1e-6,
    )


def expert_seconds(layout: Layout, cluster: ClusterConfig, k: int, computed: RowCounts, received: RowCounts) -> Seconds:
    """Model the time of one layer's routed experts for one chunk of a micro-batch, forward and backward; of any shape.

    Args:
        computed: expert rows (N).
        received: rows that they are computed from (R).
    """
    moe, kernels, item, width = layout.config.moe, layout.config.kernels, layout.item_bytes, layout.config.model.width
    hidden, local = moe.expert_width, layout.local_experts
    matrices = count_matrices(moe.activation)
    # kernels.backend=auto takes Triton on a GPU; ranks whose processor copies what is sent run on CPUs
    grouped = kernels.backend is Backend.triton or (kernels.backend is Backend.auto and not cluster.host_copies)
    masked = not grouped and k >= (kernels.masked_from_k or moe.experts + 1)
    drops = 8 if layout.config.model.dropout > 0 else 0  # hashing a mask, in passes over the hidden units
    if masked:
        flops, products = 2.0 * received * width * hidden * local, 1
        hidden_bytes = item * received * local * hidden * (4 + drops)
        row_bytes = item * received * width * 4
        operations = 20
    else:
        flops = 2.0 * computed * width * hidden
        products = 1 if grouped else local
        hidden_bytes = item * computed * hidden * (3 + drops)
        row_bytes = item * width * (6 * computed + 2 * received)
        operations = 12 if grouped else 10 + 9 * local
    seconds = matrices * products * cluster.product_seconds(flops / products, bf16=item == 2)
    if has_live_gate(moe):
        seconds = seconds + cluster.product_seconds(2.0 * received * width * moe.columns, bf16=False)
    seconds = seconds + cluster.memory_seconds(hidden_bytes + row_bytes)
    start = cluster.scale.operations * operations * cluster.operation_us * 1e-6
    found: Seconds = passes(layout.config.train) * (cluster.scale.experts * seconds + start)
    return found


def shared_seconds(layout: Layout, cluster: ClusterConfig) -> float:
    """Model the time of one layer's shared expert for one micro-batch, forward and backward; it has no chunks."""
    config = layout.config
    if not config.moe.shared_width:
        return 0.0
    product = Product(layout.tokens, config.moe.shared_width, config.model.width)
    seconds = float(cluster.product_seconds(product.flops, bf16=layout.item_bytes == 2))
    seconds *= count_matrices(config.moe.activation)
    return passes(config.train) * cluster.scale.experts * seconds


def packing_seconds(layout: Layout, cluster: ClusterConfig, rows: RowCounts, tokens: float) -> Seconds:
    """Model the time of packing rows for other ranks and of adding up what comes back, of one chunk of a layer.

    Forward and backward are both in it.

    Args:
        rows: received by a rank, its own included.
        tokens: of a rank in the chunk.
    """
    moved = cluster.memory_seconds(layout.item_bytes * layout.config.model.width * (5.0 * rows + tokens))
    start = cluster.scale.operations * 12 * cluster.operation_us * 1e-6
    found: Seconds = passes(layout.config.train) * (cluster.scale.experts * moved + start)
    return found


def optimizer_seconds(item_bytes: int, cluster: ClusterConfig, held: float, updated: float) -> float:
    """Model the time of gathering, clipping and applying gradients.

    Args:
        item_bytes: of a number of the model's compute copy.
        held: parameters of the rank.
        updated: parameters whose moments the rank keeps (ZeRO).
    """
    adam = 16 * 2 + 8  # fp32 weight, gradient and two moments read and written, and the norm
    copies = 2 * 4 + 2 * 4 + 2 * item_bytes  # into the bucket, out of it, and the model's copy
    moved = float(cluster.memory_seconds(adam * updated + copies * held))
    operations = 40 * cluster.operation_us * 1e-6 * cluster.scale.operations
    return cluster.scale.optimizer * moved + operations
