"""What a model is: the sections `model` and `moe` of a run's configuration (engine/config/run.py has the others).

Each field says its unit and what a larger value does. `feed_forward_width` says how wide dense layers are, so that a
dense model has as many parameters as the one with experts that it is compared with.
"""

from dataclasses import dataclass

from foreroute.engine.config.checks import at_least, choices, fraction
from foreroute.engine.config.enums import Activation, BalanceOver, Builder, Keys, Router, RouteWeights
from foreroute.engine.errors import require

MAX_NGRAM = 4
"""Of ids below 256, so that the number of an n-gram fits 64 bits many times over."""


@dataclass
class ModelConfig:
    """Transformer-XL (Dai et al. 2019, arXiv 1901.02860)."""

    layers: int = 4
    """Blocks of attention and feed-forward."""
    width: int = 256
    """Model width D."""
    heads: int = 8
    """Attention heads."""
    head_width: int = 64
    """Width per head; heads x head_width may differ from width."""
    memory: int = 512
    """Positions of the previous segments that attention sees (M)."""
    dropout: float = 0.1
    """Share of activations that training sets to zero."""
    attention_dropout: float = 0.0
    """Share of attention weights that training sets to zero."""
    pre_norm: bool = False
    """LayerNorm before each sublayer instead of after the residual sum (the published form)."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""
    ngram: int = 0
    """Ids in the n-grams whose learned embeddings are added to the input; 0 for none."""
    ngram_rows: int = 4096
    """Rows of that embedding; n-grams beyond them share rows by hash."""
    signatures: bool = False
    """Of a dense model: feed it at the input what hashed routing would be told, the fixed weights of each token's table
    rows over all experts at k = schedule.k_max, through a learned linear map."""

    def __post_init__(self) -> None:
        at_least("model", self, layers=1, width=1, heads=1, head_width=1, memory=0, init_std=0)
        at_least("model", self, ngram=0, ngram_rows=1)
        require(self.ngram <= MAX_NGRAM, f"model.ngram={self.ngram}: must be in 0 .. {MAX_NGRAM}")
        require(
            not (self.ngram and self.signatures),
            f"model.ngram={self.ngram} with model.signatures=true: take one of them",
        )
        fraction("model", self, "dropout", "attention_dropout")
        require(self.width % 2 == 0, f"model.width={self.width}: must be even (sine and cosine)")


@dataclass
class MoEConfig:
    """The expert layers. With router=dense they are feed-forwards of equal parameters (see dense_width)."""

    router: Router = Router.hashed
    experts: int = 16
    """Experts of a layer (E), 256 at most."""
    expert_width: int = 512
    """Hidden width of one expert (F)."""
    shared_width: int = 0
    """Hidden width of the always-active shared expert with weight 1; 0 for none."""
    dense_width: int | None = None
    """Hidden width with router=dense. None: experts x expert_width + shared_width, less what model.ngram or
    model.signatures take, for equal parameters up to the experts' output biases and the router."""
    layers: int | None = None
    """Layers, the first ones, that have experts; the others are dense of width plain_width. None: all."""
    plain_width: int = 512
    """Hidden width of layers without experts, also with router=dense."""
    activation: Activation = Activation.relu
    ngram: int = 3
    """Ids in a hashed router's key: the n-gram that ends at the token, 1 to 4."""
    keys: Keys = Keys.own
    """Whose key a hashed router looks up for a token: its own, or shuffled, that of another token of the micro-batch,
    drawn anew for each: the same load without the information."""
    rows: int = 65536
    """Rows of a table; n-grams beyond it share rows by hash."""
    builder: Builder = Builder.balanced
    pack: int | None = None
    """Experts of one block, for builder packed: a token with k active experts uses ceil(k / pack) blocks. Larger: its
    row travels to fewer ranks, and experts form fewer combinations."""
    weights: RouteWeights = RouteWeights.table
    spread: float = 2.0
    """Standard deviation of a row's fixed logits; larger means more unequal weights."""
    share_table: bool = False
    """One table for all layers instead of one for each."""
    balance_loss: float = 0.01
    """Weight of the load-balance loss of a learned router."""
    balance_over: BalanceOver = BalanceOver["global"]
    """Tokens over which a learned router is balanced: global, those of all ranks in one forward pass, or micro, each
    rank's own, which forces every small share of the text to be balanced by itself."""
    z_loss: float = 0.0
    """Weight of the router z-loss of a learned router."""
    consistency: float = 1.0
    """Weight of the loss by which a stochastic router's two passes are to agree (alpha; the published runs have 1 and
    5)."""

    def __post_init__(self) -> None:
        choices("moe", self)
        at_least("moe", self, experts=1, expert_width=1, shared_width=0, rows=1, spread=0)
        at_least("moe", self, balance_loss=0, z_loss=0, consistency=0, plain_width=1)
        for name in ("dense_width", "layers"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"moe.{name}={value}: must be at least 1")
        require(1 <= self.ngram <= MAX_NGRAM, f"moe.ngram={self.ngram}: must be in 1 .. {MAX_NGRAM}")
        require(
            self.keys is Keys.own or self.router is Router.hashed,
            f"moe.keys={self.keys.name}: needs moe.router=hashed, it is {self.router.name}",
        )
        require(self.experts <= 256, f"moe.experts={self.experts}: must be at most 256")
        require(
            (self.builder is Builder.packed) == (self.pack is not None),
            f"moe.builder={self.builder.name} with moe.pack={self.pack}: packed needs moe.pack, the others take none",
        )
        require(
            self.pack is None or (self.pack >= 1 and self.experts % self.pack == 0),
            f"moe.pack={self.pack}: must divide moe.experts={self.experts}",
        )


def expert_layers(model: ModelConfig, moe: MoEConfig) -> int:
    """Count the layers that have experts or, with router=dense, are as wide."""
    return model.layers if moe.layers is None else min(moe.layers, model.layers)


def num_tables(model: ModelConfig, moe: MoEConfig) -> int:
    """Count the tables of a hashed router, or the orders of one that draws them."""
    return 1 if moe.share_table else expert_layers(model, moe)


def feed_forward_width(model: ModelConfig, moe: MoEConfig, layer: int) -> int:
    """Give the hidden width of layer number `layer` where it is dense.

    Example: 3 layers, width 128, 16 experts x 128 are 2,048 wide. 6,144 rows of n-gram embeddings are 786,432
    parameters, and one unit of width in three layers is 3 x (2 x 128 + 1), so beside them a layer is 2,048 - 1,020 =
    1,028 wide.

    Raises:
        UserError: nothing is left beside the parameters at the input.
    """
    layers = expert_layers(model, moe)
    if layer >= layers:
        return moe.plain_width
    if moe.dense_width is not None:
        return moe.dense_width
    whole, matrices = moe.experts * moe.expert_width + moe.shared_width, 2
    if moe.activation is Activation.swiglu:
        matrices = 3
    at_input = model.ngram_rows * model.width if model.ngram else 0
    if model.signatures:
        at_input = (num_tables(model, moe) * moe.experts + 1) * model.width
    width = whole - round(at_input / (layers * (matrices * model.width + 1)))
    cause = "model.signatures=true" if model.signatures else f"model.ngram_rows={model.ngram_rows}"
    require(
        width >= 1,
        f"{cause}: no parameters are left for dense layers of equal parameters; needs fewer at the input, or"
        " moe.dense_width",
    )
    return width
