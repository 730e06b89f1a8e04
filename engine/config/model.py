"""The sections `model` and `moe` of a run's configuration; engine/config/run.py has the others.

Each help text has the unit of its option and the effect of a larger value. `feed_forward_width` is the width of dense
layers with which a dense model has as many parameters as the model with experts that it is compared with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from foreroute.engine.config.enums import Activation, BalanceOver, Builder, Gate, Keys, RouteWeights
from foreroute.engine.config.option import check, option
from foreroute.engine.errors import UserError, require

MAX_NGRAM = 4
MAX_EXPERTS = 512
DENSE = "dense"
_BY_LAYER = {
    "router": (str, "a router's name"),
    "options": (dict, "values by name"),
    "experts": (int, "a whole number"),
    "ngram": (int, "a whole number"),
}
_MOST_ENTRIES = 1 << 28  # of a table: 256 MiB of orders in bytes, and four times as much of logits


@dataclass
class ModelConfig:
    """Transformer-XL (Dai et al. 2019, arXiv 1901.02860)."""

    layers: int = option(4, "Blocks of attention and feed-forward.", at_least=1)
    width: int = option(256, "Model width D.", at_least=1)
    heads: int = option(8, "Attention heads.", at_least=1)
    head_width: int = option(64, "Width per head; heads x head_width may differ from width.", at_least=1)
    memory: int = option(512, "Positions of the previous segments that attention sees (M).", at_least=0)
    dropout: float = option(0.1, "Share of activations that training sets to zero.", at_least=0, below=1)
    attention_dropout: float = option(
        0.0, "Share of attention weights that training sets to zero.", at_least=0, below=1
    )
    pre_norm: bool = option(
        False, "LayerNorm before each sublayer instead of after the residual sum (the published form)."
    )
    init_std: float = option(0.02, "Standard deviation of initial weights.", at_least=0)
    cutoffs: list[int] = option(
        [],
        "For large vocabularies in order of frequency: ids at which they are cut into clusters, for an adaptive input "
        "embedding and softmax. Empty: all symbols in one.",
    )
    div_val: int = option(
        1, "Each cluster's embeddings are narrower than those of the one before by this factor.", at_least=1
    )
    proj_init_std: float = option(
        0.01, "Standard deviation of the initial projections from and to narrower embeddings.", at_least=0
    )
    ngram: int = option(
        0,
        "Ids in the n-grams of a dense table at the input, of one head; 0 for none. Its general form: ngram_tables.",
        at_least=0,
        at_most=MAX_NGRAM,
    )
    ngram_rows: int = option(4096, "Rows of that table; n-grams beyond them share rows by hash.", at_least=1)
    signatures: bool = option(
        False,
        "Of a dense model: feed it at the input what hashed routing would be told, the fixed weights of each token's "
        "table rows over all experts at k = schedule.k_max, through a learned linear map.",
    )

    def __post_init__(self) -> None:
        check("model", self)
        require(
            not (self.ngram and self.signatures),
            f"model.ngram={self.ngram} with model.signatures=true: take one of them",
        )
        require(self.width % 2 == 0, f"model.width={self.width}: must be even (sine and cosine)")
        require(
            all(first < second for first, second in pairwise([0, *self.cutoffs])),
            f"model.cutoffs={self.cutoffs}: must be ids above 0, each larger than the one before",
        )
        require(
            self.div_val ** len(self.cutoffs) <= self.width,
            f"model.div_val={self.div_val}: leaves the last of {len(self.cutoffs) + 1} clusters no width of"
            f" model.width={self.width}",
        )


@dataclass
class MoEConfig:
    """The expert layers. With router=dense they are feed-forwards of equal parameters (see dense_width)."""

    router: str = option(
        "hashed",
        "What chooses the experts: hashed, frozen, learned or another of docs/routers.md, package.module:Class for "
        "your own, or dense for none.",
    )
    options: dict[str, Any] = option({}, "The router's own, each as moe.options.NAME; docs/routers.md has them.")
    experts: int = option(16, "Experts of a layer (E).", at_least=1, at_most=MAX_EXPERTS)
    expert_width: int = option(512, "Hidden width of one expert (F).", at_least=1)
    constant_experts: int = option(
        0, "Experts that add a learned vector; they cost no row and no byte, but count among the k.", at_least=0
    )
    copy_experts: int = option(
        0, "Experts that return their input; they cost no row and no byte, but count among the k.", at_least=0
    )
    null_experts: int = option(
        0, "Experts that return nothing; they cost no row and no byte, but count among the k.", at_least=0
    )
    shared_width: int = option(
        0, "Hidden width of the always-active shared expert with weight 1; 0 for none.", at_least=0
    )
    residual: bool = option(
        False,
        "Weigh the experts together and the shared expert by a learned softmax of the token (PR-MoE), instead of by 1.",
    )
    dense_width: int | None = option(
        None,
        "Hidden width with router=dense. None: experts x expert_width + shared_width, less what model.ngram or "
        "model.signatures take, for equal parameters up to the experts' output biases and the router.",
        at_least=1,
    )
    layers: Any = option(
        None,
        "Layers that have experts: how many of the first ones, or a list of their numbers from 0, such as [2,3]; the"
        " others are dense of width plain_width. None: all.",
    )
    by_layer: dict[Any, Any] = option(
        {},
        "What single layers have instead, by their numbers from 0: router, options, experts and ngram, such as"
        " {0: {ngram: 1}, 2: {router: frozen, experts: 32}}. Another router begins with its own options.",
    )
    strata: int = option(
        1,
        "Expert layers one behind the other in a layer, each with experts, norm and residual sum of its own; router"
        " strata says how many of them a token passes through, k on average.",
        at_least=1,
    )
    strata_experts: list[int] = option(
        [], "Experts of each stratum, such as [4,8,16] for strata that grow. Empty: moe.experts in each."
    )
    plain_width: int = option(512, "Hidden width of layers without experts, also with router=dense.", at_least=1)
    activation: Activation = option(
        Activation.relu,
        "Non-linearity of experts and dense feed-forwards. reglu, swiglu, geglu and geglu_tanh are relu, silu, gelu and"
        " gelu_tanh with a gate: a third matrix.",
    )
    ngram: int = option(
        3, "Ids in a hashed router's key: the n-gram that ends at the token.", at_least=1, at_most=MAX_NGRAM
    )
    keys: Keys = option(
        Keys.own,
        "Whose key a hashed router looks up for a token: its own, or shuffled, that of another token of the "
        "micro-batch, drawn anew for each: the same load without the information.",
    )
    rows: int = option(65536, "Rows of a table; n-grams beyond it share rows by hash.", at_least=1)
    builder: Builder = Builder.balanced
    pack: int | None = option(
        None,
        "Experts of one block, for builder packed: a token with k active experts uses ceil(k / pack) blocks. Larger: "
        "its row travels to fewer ranks, and experts form fewer combinations.",
    )
    weights: RouteWeights = RouteWeights.table
    spread: float = option(
        2.0, "Standard deviation of a row's fixed logits; larger means more unequal weights.", at_least=0
    )
    gate: Gate = Gate.softmax
    gate_normalised: bool = option(
        True,
        "The weights of moe.weights=live are divided by their sum; if not, those of a softmax are its probabilities "
        "among all experts.",
    )
    gate_scale: float = option(1.0, "Factor of the weights of moe.weights=live.", above=0)
    share_table: bool = option(False, "One table for all layers instead of one for each.")
    balance_loss: float = option(0.01, "Weight of the load-balance loss of a learned router.", at_least=0)
    balance_over: BalanceOver = option(
        BalanceOver["global"],
        "Tokens over which a learned router is balanced: global, those of all ranks in one forward pass, or micro, "
        "each rank's own, which forces every small share of the text to be balanced by itself.",
    )
    z_loss: float = option(0.0, "Weight of the router z-loss of a learned router.", at_least=0)
    consistency: float = option(
        1.0,
        "Weight of the loss by which a stochastic router's two passes are to agree (alpha; the published runs have 1 "
        "and 5).",
        at_least=0,
    )

    def __post_init__(self) -> None:
        check("moe", self)
        self.layers = _checked_layers(self.layers)
        named = isinstance(self.router, str) and (":" in self.router or self.router in router_names())
        require(named, f"moe.router={self.router}: must be one of {', '.join(router_names())}, or package.module:Class")
        if self.router == "hashed":
            self.check_table()
        require(
            not self.residual or self.shared_width > 0, "moe.residual=true: needs a shared expert, moe.shared_width"
        )
        require(
            (self.builder is Builder.packed) == (self.pack is not None),
            f"moe.builder={self.builder.name} with moe.pack={self.pack}: packed needs moe.pack, the others take none",
        )
        require(
            self.pack is None or (self.pack >= 1 and self.experts % self.pack == 0),
            f"moe.pack={self.pack}: must divide moe.experts={self.experts}",
        )
        require(
            self.pack is None or self.columns == self.experts,
            f"moe.pack={self.pack}: takes no constant, copy or null experts, which lie in no block",
        )
        require(
            not self.dense or self.keys is Keys.own,
            f"moe.keys={self.keys.name}: must be own with moe.router=dense, which looks up no keys",
        )
        require(
            not self.dense or self.columns == self.experts, "moe.router=dense: takes no constant, copy or null experts"
        )
        require(self.columns <= MAX_EXPERTS, f"moe: has {self.columns} experts of all kinds, at most {MAX_EXPERTS}")
        whole = all(type(number) is int and 1 <= number <= MAX_EXPERTS for number in self.strata_experts)
        require(
            not self.strata_experts or (whole and len(self.strata_experts) == self.strata > 1),
            f"moe.strata_experts={self.strata_experts}: must be whole numbers in 1 .. {MAX_EXPERTS}, one for each of"
            f" moe.strata={self.strata}, which must be at least 2",
        )
        self._check_by_layer()

    def _check_by_layer(self) -> None:
        """Check what single layers have, and sort it by their numbers, as text."""
        self.by_layer = _checked_by_layer(self.by_layer)
        if not self.by_layer:
            return
        require(not self.dense, "moe.by_layer: must be empty with moe.router=dense")
        require(self.strata == 1, f"moe.by_layer with moe.strata={self.strata}: takes one expert layer in each layer")
        require(not self.share_table, "moe.by_layer with moe.share_table=true: each layer has a router of its own")
        for layer in self.by_layer:
            try:
                section = self.at_layer(int(layer))
            except UserError as error:
                raise UserError(f"moe.by_layer.{layer}: {error}") from error
            words = f"moe.by_layer.{layer}.router=dense: must have experts; moe.layers lists the layers that have"
            require(not section.dense, words)

    def at_layer(self, layer: int) -> "MoEConfig":
        """Return the section as it is for layer number `layer` of the model."""
        own = self.by_layer.get(str(layer))
        if own is None:
            return self
        if "router" in own:
            own = {"options": {}, **own}
        return replace(self, by_layer={}, **own)

    def at_stratum(self, stratum: int) -> "MoEConfig":
        """Return the section as it is for a stratum, the first being 0."""
        if not self.strata_experts:
            return self
        return replace(self, experts=self.strata_experts[stratum], strata_experts=[])

    @property
    def layer_experts(self) -> int:
        """Experts of all strata of a layer."""
        return sum(self.strata_experts) or self.strata * self.experts

    @property
    def fewest_experts(self) -> int:
        """Experts of the layer that has the fewest."""
        return min(section.experts for section in (self, *map(self.at_layer, map(int, self.by_layer))))

    def check_table(self) -> None:
        """Raise UserError if a table would be too large."""
        require(
            self.rows * self.columns <= _MOST_ENTRIES,
            f"moe.rows={self.rows} with moe.experts={self.experts}: must be at most {_MOST_ENTRIES} together, rows x"
            " experts, since each table is held in memory",
        )

    @property
    def dense(self) -> bool:
        """Whether there are no experts."""
        return self.router == DENSE

    @property
    def columns(self) -> int:
        """Experts of all kinds; the moe.experts with rows come first, then constants, copies and nulls."""
        return self.experts + self.constant_experts + self.copy_experts + self.null_experts


@cache
def router_names() -> list[str]:
    """List the routers that come with this program, the files in engine/routing/planned/ and live/, and dense."""
    folder = Path(__file__).parents[1] / "routing"
    files = [file.stem for kind in ("planned", "live") for file in (folder / kind).glob("[!_]*.py")]
    return [*sorted(files), DENSE]


def _checked_layers(value: Any) -> int | list[int] | None:
    """Return moe.layers with numbers that are text, as on a command line, as numbers."""
    items = value if isinstance(value, list) else [value]
    numbers = [int(item) if isinstance(item, str) and item.isdecimal() else item for item in items]
    if numbers in ([None], ["null"]):
        return None
    least = 0 if isinstance(value, list) else 1
    whole = all(type(number) is int and number >= least for number in numbers)
    require(
        whole and len(numbers) > 0 and all(first < second for first, second in pairwise(numbers)),
        f"moe.layers={value}: must be how many of the first layers have experts, at least 1, or an ascending list of"
        " their numbers from 0, such as [2,3]",
    )
    return numbers if isinstance(value, list) else numbers[0]


def _checked_by_layer(value: Any) -> dict[str, dict[str, Any]]:
    """Return moe.by_layer by ascending numbers as text, whether they were given as numbers or as text."""
    found: dict[str, dict[str, Any]] = {}
    for layer, own in value.items():
        require(
            str(layer).isdecimal() and isinstance(own, dict),
            f"moe.by_layer.{layer}={own}: must be options by the number of a layer from 0, such as {{2: {{ngram: 1}}}}",
        )
        for name, choice in own.items():
            words = f"moe.by_layer.{layer}.{name}: must be one of {', '.join(_BY_LAYER)}, which layers may differ in"
            require(name in _BY_LAYER, words)
            kind, of_kind = _BY_LAYER[name]
            require(type(choice) is kind, f"moe.by_layer.{layer}.{name}={choice}: must be {of_kind}")
        key = str(int(layer))
        found[key] = {**found.get(key, {}), **own}
    return {layer: found[layer] for layer in sorted(found, key=int)}


def expert_layers(model: ModelConfig, moe: MoEConfig) -> Sequence[int]:
    """Return the numbers of the layers that have experts or, with router=dense, are as wide."""
    if isinstance(moe.layers, list):
        return moe.layers
    return range(model.layers if moe.layers is None else min(moe.layers, model.layers))


def expert_sections(model: ModelConfig, moe: MoEConfig) -> list[MoEConfig]:
    """List the section `moe` of each expert layer; each stratum is one."""
    layers = [moe.at_layer(layer) for layer in expert_layers(model, moe)]
    return [section.at_stratum(stratum) for section in layers for stratum in range(moe.strata)]


def num_tables(model: ModelConfig, moe: MoEConfig) -> int:
    """Count the tables of a hashed router, or the orders of one that draws them."""
    return moe.strata * (1 if moe.share_table else len(expert_layers(model, moe)))


def feed_forward_width(model: ModelConfig, moe: MoEConfig, layer: int) -> int:
    """Return the hidden width of layer number `layer` where it is dense.

    Example: 3 layers, width 128, 16 experts x 128 are 2,048 wide. 6,144 rows of n-gram embeddings are 786,432
    parameters, and one unit of width in three layers is 3 x (2 x 128 + 1), so beside them a layer is 2,048 - 1,020 =
    1,028 wide.

    Raises:
        UserError: nothing is left beside the parameters at the input.
    """
    layers = expert_layers(model, moe)
    if layer not in layers:
        return moe.plain_width
    if moe.dense_width is not None:
        return moe.dense_width
    whole, matrices = moe.layer_experts * moe.expert_width + moe.strata * moe.shared_width, 2
    if moe.activation.gated:
        matrices = 3
    at_input = model.ngram_rows * model.width if model.ngram else 0
    if model.signatures:
        at_input = (num_tables(model, moe) * moe.experts + 1) * model.width
    width = whole - round(at_input / (len(layers) * (matrices * model.width + 1)))
    cause = "model.signatures=true" if model.signatures else f"model.ngram_rows={model.ngram_rows}"
    require(
        width >= 1,
        f"{cause}: no parameters are left for dense layers of equal parameters; needs fewer at the input, or"
        " moe.dense_width",
    )
    return width
