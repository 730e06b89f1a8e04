"""A run's useful arithmetic and the parameters that a symbol uses, at each k; the same on any number of ranks.

`forward_flops` says what is useful. The certificate's model of time counts by the same products.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from foreroute.engine.config import Config
from foreroute.engine.config.enums import Activation, Growth, Router
from foreroute.engine.config.model import feed_forward_width
from foreroute.engine.routing.k_schedule import active_experts


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

    Useful is what the model asks for, whatever way it is computed in: products of matrices with the memory full, each
    query with the keys that it may see, k experts for each symbol. Hidden keys of a tile, experts that a masked product
    computes in vain, recomputation, and distances that each rank and micro-batch projects anew are not in it; nor is
    anything that is no product of matrices (embedding, normalisation, softmax, weighted sums).

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
    layers = [layer_products(config, tokens, layer, k) for layer in range(model.layers)]
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


def layer_products(config: Config, rows: float, layer: int, k: int) -> list[Product]:
    """Router and feed-forward or active experts of a layer."""
    model, moe = config.model, config.moe
    if moe.router is Router.dense or layer >= config.expert_layers:
        return [feed_forward_product(config, rows, feed_forward_width(model, moe, layer))]
    found = [feed_forward_product(config, rows, k * moe.expert_width + moe.shared_width)]
    if moe.router in (Router.frozen, Router.learned):
        found.append(Product(rows, moe.experts, model.width))
    return found


def feed_forward_product(config: Config, rows: float, hidden: float) -> Product:
    """Give the products of a feed-forward with so many rows and hidden units."""
    return Product(rows, hidden, config.model.width, count_matrices(config))


def _flops(products: Iterable[Product]) -> float:
    return sum(product.count * product.flops for product in products)


def count_matrices(config: Config) -> int:
    """Products of an expert in a forward pass."""
    return 3 if config.moe.activation is Activation.swiglu else 2


FORWARD_AND_BACKWARD = 3
"""Passes that a training step weighs: backward makes two products of each one of forward. (A little less in truth:
encoded distances and a frozen gate get no gradient.)"""


class Arithmetic:
    """FLOPs and active parameters of a run.

    Args:
        vocab: symbols.
        parameters: of the whole model.
    """

    def __init__(self, config: Config, vocab: int, parameters: int) -> None:
        self._config, self._vocab, self._parameters = config, vocab, parameters
        self._step_flops: dict[int, float] = {}

    def step_flops(self, k: int) -> float:
        """Forward and backward of one optimizer step at this k, all ranks."""
        if k not in self._step_flops:
            passes = FORWARD_AND_BACKWARD * self._config.training_passes
            self._step_flops[k] = passes * forward_flops(self._config, self._vocab, k)
        return self._step_flops[k]

    def flops_per_symbol(self, k: int) -> float:
        """One forward pass of one symbol."""
        return forward_flops(self._config, self._vocab, k) / self._config.symbols_per_step

    def flops_before(self, step: int) -> float:
        """Of the first so many steps."""
        schedule, total = self._config.schedule, self._config.schedule_steps
        steps = Counter(active_experts(schedule, done, total) for done in range(step))
        return sum(times * self.step_flops(k) for k, times in steps.items())

    def active_parameters(self, k: int) -> int:
        """Parameters that a symbol uses: all but those of the experts, and of the n-grams' embeddings, that it does
        not.

        Example: experts of 10 parameters each, 4 in each of 3 layers: at k = 1 a model of 500 uses 500 - 3 x 3 x 10 =
        410.
        """
        model, moe = self._config.model, self._config.moe
        used = self._parameters - (model.ngram > 0) * (model.ngram_rows - 1) * model.width
        if moe.router is Router.dense:
            return used
        expert = count_matrices(self._config) * moe.expert_width * model.width + moe.expert_width + model.width
        return used - self._config.expert_layers * (moe.experts - k) * expert

    def by_k(self) -> dict[str, int]:
        """Name each k of the schedule and of the evaluation; "dense" where there are no experts."""
        config, schedule = self._config, self._config.schedule
        if config.moe.router is Router.dense:
            return {"dense": schedule.k_max}
        first = schedule.k_max if schedule.growth is Growth.constant else schedule.k_min
        return {str(k): k for k in sorted({*config.eval.k, *range(first, schedule.k_max + 1)})}
