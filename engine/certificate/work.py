"""What a step computes, counted in matrix products, bytes and operations: its useful arithmetic (`forward_flops`), and what of
it all one rank does and how long that takes on a cluster.

The counts follow the code that runs: engine/model.py, engine/attention.py, kernels/relative_attention.py, engine/moe,
kernels/ and DeepSpeed's Adam. Products are exact; bytes of elementwise operations and numbers of operations are counted
by hand to about a fifth, which the cluster's scales take up where they were measured.

Letters: B streams of a rank in a micro-batch, Q segment, M memory, S = M + Q, T = B x Q tokens, D width, H heads, W head
width, I = H x W, V vocabulary, L experts of a rank, F expert width, N computed expert rows, R received rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from math import ceil

import numpy as np
from numpy.typing import NDArray

from engine.architecture import feed_forward_width
from engine.certificate.cluster import ClusterConfig
from engine.certificate.memory_shapes import item_bytes
from engine.choices import Activation, Backend, Router
from engine.config import Config
from kernels.relative_attention import tile_shape

Seconds = NDArray[np.float64]
Rows = NDArray[np.float64]

_BACKWARD = 2.0  # products, bytes and operations of backward against forward: two gradients for each product


@dataclass(frozen=True, slots=True)
class Product:
    """So many products of matrices, [rows, depth] by [depth, columns]."""

    rows: float
    columns: float
    depth: float
    count: float = 1

    @property
    def flops(self) -> float:
        """Multiplications and additions of one of them."""
        return 2 * self.rows * self.columns * self.depth


def forward_flops(config: Config, vocab: int, k: int) -> float:
    """Count the useful arithmetic of one forward pass over a step's symbols, of all ranks; backward is twice as much.

    Useful is what the model asks for, whatever way it is computed in: products of matrices with the memory full, each query
    with the keys that it may see, k experts for each symbol. Hidden keys of a tile, experts that a masked product computes in
    vain, recomputation, and distances that each rank and micro-batch projects anew are not in it; nor is anything that is no
    product of matrices (embedding, normalisation, softmax, weighted sums).

    Example: a dense feed-forward of width 3 in a model of width 2 adds 2 x 2 x 2 x 3 = 24 for each symbol and layer.

    Args:
        vocab: symbols (V).
        k: active experts; no matter when dense.
    """
    model, moe, tokens = config.model, config.moe, config.symbols_per_step
    streams = config.data.streams
    attention = [
        *projection_products(config, streams),
        score_products(config, block=1, together=streams, tiles=model.heads * config.data.segment),
    ]
    layers = [_layer_products(config, tokens, layer, k) for layer in range(model.layers)]
    at_input = config.num_tables * moe.experts if model.signatures else 0
    ends = [Product(tokens, vocab, model.width), Product(tokens, model.width, at_input)]
    return model.layers * _flops(attention) + _flops(chain(*layers, ends))


def projection_products(config: Config, streams: int) -> list[Product]:
    """Projections of one layer's attention: queries, keys and values, distances, output.

    Args:
        streams: that share the projected distances.
    """
    model, queries = config.model, config.data.segment
    keys, inner, tokens = queries + model.memory, model.heads * model.head_width, streams * queries
    return [
        Product(tokens, inner, model.width),
        Product(streams * keys, 2 * inner, model.width),
        Product(keys, inner, model.width),
        Product(tokens, model.width, inner),
    ]


def score_products(config: Config, *, block: int, together: int, tiles: int) -> Product:
    """Scores by content, scores by distance and weighted values of one layer, in so many tiles.

    Args:
        block: queries of a tile; it computes the keys that any of them sees.
        together: streams of a tile.
    """
    queries, keys = config.data.segment, config.data.segment + config.model.memory
    seen = keys - (queries - block) / 2  # keys of a block of queries, on average
    return Product(together * block, seen, config.model.head_width, 3 * tiles)


def _layer_products(config: Config, rows: float, layer: int, k: int) -> list[Product]:
    """Router and feed-forward or active experts of a layer."""
    model, moe = config.model, config.moe
    if moe.router is Router.dense or layer >= config.expert_layers:
        return [_feed_forward_product(config, rows, feed_forward_width(model, moe, layer))]
    found = [_feed_forward_product(config, rows, k * moe.expert_width + moe.shared_width)]
    if moe.router in (Router.frozen, Router.learned):
        found.append(Product(rows, moe.experts, model.width))
    return found


def _feed_forward_product(config: Config, rows: float, hidden: float) -> Product:
    return Product(rows, hidden, config.model.width, _matrices(config))


def _flops(products: Iterable[Product]) -> float:
    return sum(product.count * product.flops for product in products)


@dataclass(frozen=True, slots=True)
class ModelSeconds:
    """One micro-batch through all layers, without what the experts compute; forward and backward."""

    attention: float
    rest: float
    operations: float


def passes(config: Config) -> float:
    """Forward passes that one forward and backward pass weighs; recomputation makes one more."""
    return 1 + _BACKWARD + (1 if config.train.recompute else 0)


def model_seconds(config: Config, cluster: ClusterConfig, streams: int, vocab: int) -> ModelSeconds:
    """Time of one micro-batch outside the experts.

    Args:
        streams: of this rank in the micro-batch (B).
        vocab: symbols (V).
    """
    model, item, bf16 = config.model, item_bytes(config), item_bytes(config) == 2
    queries, keys = config.data.segment, config.data.segment + model.memory
    inner, width, tokens = (
        model.heads * model.head_width,
        model.width,
        streams * config.data.segment,
    )

    def seconds(*products: Product) -> float:
        return sum(
            product.count * float(cluster.product_seconds(product.flops, bf16=bf16))
            for product in products
        )

    together, block = tile_shape(
        streams, queries, keys, item_bytes=item, gpu=not cluster.host_copies
    )
    tiles = model.heads * ceil(queries / block) * ceil(streams / together)
    projections = seconds(*projection_products(config, streams))
    score_product = score_products(config, block=block, together=together, tiles=tiles)
    scores = seconds(score_product)
    score_bytes = 6 * item * streams * model.heads * queries * score_product.columns
    moved_bytes = item * (
        8 * tokens * inner + 6 * streams * keys * inner + 2 * streams * keys * width
    )
    attention = projections + scores + float(cluster.memory_seconds(score_bytes + moved_bytes))
    residual = float(cluster.memory_seconds(20 * item * tokens * width))
    loss = seconds(Product(tokens, vocab, width)) + float(
        cluster.memory_seconds((item + 16) * tokens * vocab)
    )
    operations = model.layers * (45 + 9 * tiles) + 25
    layers, weigh = model.layers, passes(config)
    return ModelSeconds(
        attention=cluster.scale.attention * weigh * layers * attention,
        rest=cluster.scale.rest * (weigh * layers * residual + (1 + _BACKWARD) * loss),
        operations=cluster.scale.operations * weigh * operations * cluster.operation_us * 1e-6,
    )


def expert_seconds(
    config: Config, cluster: ClusterConfig, k: int, computed: Rows, received: Rows, *, local: int
) -> Seconds:  # fmt: skip
    """Time of the routed experts of one layer for one part of a micro-batch, forward and backward; of any shape.

    Args:
        computed: expert rows (N).
        received: rows that they are computed from (R).
        local: experts of the rank (L).
    """
    moe, item, width = config.moe, item_bytes(config), config.model.width
    hidden = moe.expert_width
    matrices = _matrices(config)
    grouped = config.kernels.backend is Backend.triton or _on_gpu(cluster, config)
    masked = not grouped and k >= (config.kernels.masked_from_k or moe.experts + 1)
    drops = 8 if config.model.dropout > 0 else 0  # hashing a mask, in passes over the hidden units
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
    seconds = seconds + cluster.memory_seconds(hidden_bytes + row_bytes)
    start = cluster.scale.operations * operations * cluster.operation_us * 1e-6
    found: Seconds = passes(config) * (cluster.scale.experts * seconds + start)
    return found


def shared_seconds(config: Config, cluster: ClusterConfig, tokens: int) -> float:
    """Time of the shared expert of one layer for one micro-batch, forward and backward; it is never cut into parts.

    Args:
        tokens: of the rank (T).
    """
    moe, item = config.moe, item_bytes(config)
    if not moe.shared_width:
        return 0.0
    product = _feed_forward_product(config, tokens, moe.shared_width)
    seconds = product.count * float(cluster.product_seconds(product.flops, bf16=item == 2))
    return passes(config) * cluster.scale.experts * seconds


def packing_seconds(config: Config, cluster: ClusterConfig, rows: Rows, tokens: float) -> Seconds:
    """Time of packing rows for other ranks and of adding up what comes back, of one part of a layer, forward and backward.

    Args:
        rows: received by a rank, its own included.
        tokens: of a rank in the part.
    """
    item, width = item_bytes(config), config.model.width
    moved = cluster.memory_seconds(item * width * (5.0 * rows + tokens))
    start = cluster.scale.operations * 12 * cluster.operation_us * 1e-6
    found: Seconds = passes(config) * (cluster.scale.experts * moved + start)
    return found


def optimizer_seconds(config: Config, cluster: ClusterConfig, held: float, updated: float) -> float:
    """Time of gathering, clipping and applying gradients.

    Args:
        held: parameters of the rank.
        updated: parameters whose moments the rank keeps (ZeRO).
    """
    adam = 16 * 2 + 8  # fp32 weight, gradient and two moments read and written, and the norm
    copies = (
        2 * 4 + 2 * 4 + 2 * item_bytes(config)
    )  # into the bucket, out of it, and the model's copy
    moved = float(cluster.memory_seconds(adam * updated + copies * held))
    operations = 40 * cluster.operation_us * 1e-6 * cluster.scale.operations
    return cluster.scale.optimizer * moved + operations


def _matrices(config: Config) -> int:
    """Products of an expert in a forward pass."""
    return 3 if config.moe.activation is Activation.swiglu else 2


def _on_gpu(cluster: ClusterConfig, config: Config) -> bool:
    """kernels.backend=auto takes Triton on a GPU; ranks whose processor copies what is sent run on CPUs."""
    return config.kernels.backend is Backend.auto and not cluster.host_copies
