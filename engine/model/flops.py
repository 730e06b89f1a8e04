"""A run's useful arithmetic and the parameters that a symbol uses, at each k; the same on any number of ranks.

`forward_flops` defines what is useful. The certificate's model of time counts the same products.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from foreroute.engine.config import Config
from foreroute.engine.config.enums import Activation, Growth, NgramEntry
from foreroute.engine.config.model import ModelConfig, MoEConfig, expert_layers, feed_forward_width, num_tables
from foreroute.engine.config.ngram_tables import NgramTablesConfig
from foreroute.engine.model.adaptive import clusters
from foreroute.engine.routing.k_schedule import active_experts
from foreroute.engine.routing.methods import has_live_gate, live_method, training_passes


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


def forward_flops(
    model: ModelConfig,
    moe: MoEConfig,
    *,
    streams: int,
    segment: int,
    vocab: int,
    k: int,
    shares: Sequence[float] = (),
    tables: NgramTablesConfig | None = None,
) -> float:
    """Count the useful arithmetic of one forward pass over a step's symbols, of all ranks; backward is twice as much.

    Useful are the products of matrices that the model asks for, however they are computed: with the memory full, each
    query with the keys that it may see, k experts for each symbol. The count leaves out hidden keys of a tile, experts
    that a masked product computes and drops, recomputation, and distances that each rank and micro-batch projects anew.
    It also leaves out all that is no product of matrices: embedding, normalisation, softmax, weighted sums.

    Example: a dense feed-forward of width 3 in a model of width 2 adds 2 x 2 x 2 x 3 = 24 for each symbol and layer.

    Args:
        streams: of all ranks.
        segment: symbols of a stream in a step.
        vocab: symbols (V).
        k: active experts; ignored when dense.
        shares: of the symbols that each cluster has (engine/model/adaptive.py); ignored without cut-offs.
        tables: of n-grams; None: there are none.
    """
    tokens = streams * segment
    attention = [
        *projection_products(model, streams=streams, segment=segment),
        score_products(model, segment=segment, block=1, together=streams, tiles=model.heads * segment),
    ]
    layers = [layer_products(model, moe, tokens, layer, k) for layer in range(model.layers)]
    at_input = num_tables(model, moe) * moe.experts if model.signatures else 0
    ends = [*end_products(model, vocab, tokens, shares), Product(tokens, model.width, at_input)]
    if tables is not None:
        ends += table_products(tables, model, streams=streams, segment=segment)
    return model.layers * _flops(attention) + _flops(chain(*layers, ends))


def projection_products(model: ModelConfig, *, streams: int, segment: int) -> list[Product]:
    """List the projections of one layer's attention: queries, keys and values, distances, output.

    Args:
        streams: that share the projected distances.
    """
    keys, inner, tokens = segment + model.memory, model.heads * model.head_width, streams * segment
    return [
        Product(tokens, inner, model.width),
        Product(streams * keys, 2 * inner, model.width),
        Product(keys, inner, model.width),
        Product(tokens, model.width, inner),
    ]


def score_products(model: ModelConfig, *, segment: int, block: int, together: int, tiles: int) -> Product:
    """Return the scores by content, scores by distance and weighted values of one layer, in so many tiles.

    Args:
        block: queries of a tile; it computes the keys that any of them sees.
        together: streams of a tile.
    """
    seen = segment + model.memory - (segment - block) / 2  # keys of a block of queries, on average
    return Product(together * block, seen, model.head_width, 3 * tiles)


def layer_products(model: ModelConfig, moe: MoEConfig, rows: float, layer: int, k: int) -> list[Product]:
    """List the products of a layer's router and feed-forward or active experts."""
    moe, matrices = moe.at_layer(layer), count_matrices(moe.activation)
    if moe.dense or layer not in expert_layers(model, moe):
        return [Product(rows, feed_forward_width(model, moe, layer), model.width, matrices)]
    active = k * moe.experts / moe.columns  # of k, constants, copies and nulls compute nothing
    found = [Product(rows, active * moe.expert_width + moe.strata * moe.shared_width, model.width, matrices)]
    if live_method(moe) is not None or has_live_gate(moe):
        found.append(Product(rows, moe.columns, model.width))
    if moe.constant_experts:  # what mixes them with the token, and their vectors
        found.append(Product(rows, moe.constant_experts, model.width, 3))
    if moe.residual:
        found.append(Product(rows, 2, model.width))
    return found


def end_products(model: ModelConfig, vocab: int, tokens: float, shares: Sequence[float] = ()) -> list[Product]:
    """List the products of the output layer and, with narrower embeddings, of the input.

    Args:
        vocab: symbols (V).
        shares: of the tokens that each cluster has; without them as if each one had all, which is a bound.
    """
    found = clusters(model, vocab)
    shares = shares or (1.0,) * len(found)
    head, *tails = found
    products = [Product(tokens, head.size + len(tails), head.width)]
    products += [Product(tokens * share, tail.size, tail.width) for share, tail in zip(shares[1:], tails, strict=True)]
    if tails and model.div_val > 1:
        at_output = (1.0, *shares[1:])
        for share, out_share, cluster in zip(shares, at_output, found, strict=True):
            products.append(Product(tokens * (share + out_share), cluster.width, model.width))
    return products


def table_products(tables: NgramTablesConfig, model: ModelConfig, *, streams: int, segment: int) -> list[Product]:
    """List the products that project rows of n-gram tables, at all places, of which a dense table has one; into
    attention's values of memory too."""
    read, places = tables.heads_read * tables.width, len(tables.places) or int(tables.rows > 0)
    if tables.entry in (NgramEntry.gate, NgramEntry.per_layer):
        return [Product(streams * segment, model.width, read, 2 * places)]
    into_values, inner = tables.entry is NgramEntry.values, model.heads * model.head_width
    wanted, positions = (inner, segment + model.memory) if into_values else (model.width, segment)
    return [] if read == wanted else [Product(streams * positions, wanted, read, places)]


def _flops(products: Iterable[Product]) -> float:
    return sum(product.count * product.flops for product in products)


def count_matrices(activation: Activation) -> int:
    """Count the products of an expert in a forward pass."""
    return 3 if activation.gated else 2


FORWARD_AND_BACKWARD = 3
"""Forward passes that a training step weighs: backward makes two products of each one of forward. (In truth a little
less: encoded distances and a frozen gate get no gradient.)"""


class Arithmetic:
    """Counts the FLOPs and the active parameters of a run.

    Args:
        vocab: symbols.
        parameters: of the whole model, but of its n-gram tables only the rows that a symbol reads.
        shares: as for forward_flops.
    """

    def __init__(self, config: Config, vocab: int, parameters: int, shares: Sequence[float] = ()) -> None:
        self._config, self._vocab, self._parameters, self._shares = config, vocab, parameters, shares
        self._step_flops: dict[int, float] = {}

    def step_flops(self, k: int) -> float:
        """Count forward and backward of one optimizer step at this k, all ranks."""
        if k not in self._step_flops:
            passes = FORWARD_AND_BACKWARD * training_passes(self._config.model, self._config.moe)
            self._step_flops[k] = passes * self._forward(k)
        return self._step_flops[k]

    def flops_per_symbol(self, k: int) -> float:
        """Count one forward pass of one symbol."""
        return self._forward(k) / self.symbols_per_step

    @property
    def symbols_per_step(self) -> int:
        """Training symbols of one optimizer step over all ranks."""
        return self._config.symbols_per_step

    def _forward(self, k: int) -> float:
        config, data = self._config, self._config.data
        return forward_flops(
            config.model,
            config.moe,
            streams=data.streams,
            segment=data.segment,
            vocab=self._vocab,
            k=k,
            shares=self._shares,
            tables=config.ngram_tables,
        )

    def flops_before(self, step: int) -> float:
        """Count the first so many steps."""
        schedule, total = self._config.schedule, self._config.schedule_steps
        steps = Counter(active_experts(schedule, done, total) for done in range(step))
        return sum(times * self.step_flops(k) for k, times in steps.items())

    def active_parameters(self, k: int) -> int:
        """Count the parameters that a symbol uses: all but those of experts and table rows that it does not.

        Example: experts of 10 parameters each, 4 in each of 3 layers: at k = 1 a model of 500 uses 500 - 3 x 3 x 10 =
        410.
        """
        model, moe = self._config.model, self._config.moe
        if moe.dense:
            return self._parameters
        expert = count_matrices(moe.activation) * moe.expert_width * model.width + moe.expert_width + model.width
        sections = [moe.at_layer(layer) for layer in expert_layers(model, moe)]
        unused = sum(round((own.layer_experts - k * own.experts / own.columns) * expert) for own in sections)
        return self._parameters - unused

    def by_k(self) -> dict[str, int]:
        """Return each k of the schedule and of the evaluation by its name; "dense" where there are no experts."""
        config, schedule = self._config, self._config.schedule
        if config.moe.dense:
            return {"dense": schedule.k_max}
        first = schedule.k_max if schedule.growth is Growth.constant else schedule.k_min
        return {str(k): k for k in sorted({*config.eval.k, *range(first, schedule.k_max + 1)})}
