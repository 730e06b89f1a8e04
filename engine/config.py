"""The run's configuration as validated dataclasses; the schema that the Hydra files in conf/ fill in.

Each field says its unit and what a larger value does. Everything is checked here, at start-up; the rest of
the engine receives these plain objects and may trust them. Derived numbers are properties, computed once here.
"""

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from engine.choices import (
    Activation,
    Backend,
    BalanceOver,
    Builder,
    Corpus,
    Decay,
    ExchangeKind,
    Growth,
    Kept,
    PeerIds,
    Precision,
    Products,
    Router,
    RouteWeights,
    Split,
    Tokens,
    WandbMode,
    WireFormat,
)
from engine.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def _at_least(section: str, config: object, **minimum: float) -> None:
    for name, low in minimum.items():
        value = getattr(config, name)
        require(value >= low, f"{section}.{name}={value}: must be at least {low}")


def _fraction(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value < 1, f"{section}.{name}={value}: must be in [0, 1)")


@dataclass
class CorpusConfig:
    """Text and how it is cut into symbols."""

    name: Corpus = Corpus.stdlib
    path: str | None = None
    """File to read: required for `file`; for `enwik8` a local copy, whole or a prefix of it."""
    tokens: Tokens = Tokens.bytes
    cache_dir: str = ".cache"
    """Folder of prepared corpora and tables; safe to delete."""

    def __post_init__(self) -> None:
        require(
            not (self.name is Corpus.file and not self.path),
            "corpus.path is missing: corpus=file needs corpus.path=FILE",
        )
        require(
            not (self.name is Corpus.stdlib and self.path),
            f"corpus.path={self.path}: corpus=stdlib takes no path (use corpus=file)",
        )


@dataclass
class DataConfig:
    """How the training stream is laid out (see docs in engine/data.py)."""

    streams: int = 22
    """Contiguous streams over all ranks; = world x accumulation x streams per micro-batch."""
    segment: int = 512
    """Symbols per stream and step (Q)."""
    prefetch: int = 2
    """Batches planned ahead of the step by the background worker."""

    def __post_init__(self) -> None:
        _at_least("data", self, streams=1, segment=1, prefetch=1)


@dataclass
class ModelConfig:
    """Transformer-XL (Dai et al. 2019, arXiv 1901.02860)."""

    layers: int = 4
    width: int = 256
    """Model width D."""
    heads: int = 8
    head_width: int = 64
    """Width per head; heads x head_width may differ from width."""
    memory: int = 512
    """Positions of the previous segments that attention sees (M)."""
    dropout: float = 0.1
    attention_dropout: float = 0.0
    pre_norm: bool = False
    """LayerNorm before each sublayer instead of after the residual sum (the published form)."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""

    def __post_init__(self) -> None:
        _at_least("model", self, layers=1, width=1, heads=1, head_width=1, memory=0, init_std=0)
        _fraction("model", self, "dropout", "attention_dropout")
        require(self.width % 2 == 0, f"model.width={self.width}: must be even (sine and cosine)")


@dataclass
class MoEConfig:
    """The expert layers. With router=dense: one feed-forward of width experts x expert_width + shared_width."""

    router: Router = Router.hashed
    experts: int = 16
    expert_width: int = 512
    """Hidden width of one expert (F)."""
    shared_width: int = 0
    """Hidden width of the always-active shared expert with weight 1; 0 for none."""
    activation: Activation = Activation.relu
    ngram: int = 3
    """Ids in a hashed router's key: the n-gram that ends at the token."""
    rows: int = 65536
    """Rows of a table; n-grams beyond it share rows by hash."""
    builder: Builder = Builder.balanced
    pack: int | None = None
    """Experts of one block, for builder packed: a token with k active experts uses ceil(k / pack) blocks. Larger: its row
    travels to fewer ranks, and experts form fewer combinations."""
    weights: RouteWeights = RouteWeights.table
    spread: float = 2.0
    """Standard deviation of a row's fixed logits; larger means more unequal weights."""
    share_table: bool = False
    """One table for all layers instead of one for each."""
    balance_loss: float = 0.01
    """Weight of the load-balance loss of a learned router."""
    balance_over: BalanceOver = BalanceOver["global"]
    """Tokens over which a learned router is balanced: global, those of all ranks in one forward pass, or micro, each rank's
    own, which forces every small share of the text to be balanced by itself."""
    z_loss: float = 0.0
    """Weight of the router z-loss of a learned router."""

    def __post_init__(self) -> None:
        _at_least("moe", self, experts=1, expert_width=1, shared_width=0, rows=1, spread=0)
        _at_least("moe", self, balance_loss=0, z_loss=0)
        require(1 <= self.ngram <= 3, f"moe.ngram={self.ngram}: must be 1, 2 or 3")
        require(self.experts <= 256, f"moe.experts={self.experts}: must be at most 256")
        require(
            (self.builder is Builder.packed) == (self.pack is not None),
            f"moe.builder={self.builder.name} with moe.pack={self.pack}: packed needs moe.pack, the others take none",
        )
        require(
            self.pack is None or (self.pack >= 1 and self.experts % self.pack == 0),
            f"moe.pack={self.pack}: must divide moe.experts={self.experts}",
        )

    @property
    def dense_width(self) -> int:
        """Hidden width of the dense layer of equal parameters."""
        return self.experts * self.expert_width + self.shared_width


@dataclass
class ScheduleConfig:
    """Number of active experts k over optimizer steps."""

    growth: Growth = Growth.constant
    k_min: int = 4
    """k of the first step, where it grows."""
    k_max: int = 4
    """Largest k in training; the k of `constant`, which ignores k_min. May stay below moe.experts."""
    steps: int | None = None
    """Steps over which k grows; None means train.steps."""

    def __post_init__(self) -> None:
        _at_least("schedule", self, k_min=1, k_max=1)
        require(
            self.growth is Growth.constant or self.k_min <= self.k_max,
            f"schedule.k_min={self.k_min}: must be at most schedule.k_max={self.k_max}",
        )
        require(
            self.steps is None or self.steps >= 1,
            f"schedule.steps={self.steps}: must be at least 1",
        )


@dataclass
class OptimConfig:
    """Adam with warm-up and decay to final_lr."""

    lr: float = 2.5e-4
    """Learning rate after warm-up, the largest of the run."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.999
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the mean of squares; larger shortens the steps of rare weights."""
    weight_decay: float = 0.0
    """Decoupled (AdamW); 0 is plain Adam."""
    clip: float = 0.25
    """Largest global gradient norm; 0 turns clipping off."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises to lr."""
    decay: Decay = Decay.cosine
    final_lr: float = 0.0
    """Learning rate of the last step, where it decays."""

    def __post_init__(self) -> None:
        _at_least("optim", self, lr=0, weight_decay=0, clip=0, warmup_steps=0, final_lr=0, eps=0)
        _fraction("optim", self, "beta1", "beta2")


@dataclass
class TrainConfig:
    """The training loop."""

    name: str = "run"
    """Name of the run; its folder is runs_dir/name."""
    runs_dir: str = "runs"
    """Folder of run folders; many machines must share it."""
    steps: int = 1000
    """Optimizer steps."""
    seed: int = 1111
    """Of initial weights, dropout and tables, below 2**32."""
    precision: Precision = Precision.fp32
    accumulation: int = 1
    """Micro-batches per optimizer step; splits streams, never time."""
    recompute: bool = False
    """Activation checkpointing: keep one tensor per layer, compute the rest again in backward."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage: what is shared out over the ranks. 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also
    weights."""
    offload: bool = False
    """Keep the optimizer's state, and update the weights, in host memory: slower, frees device memory (zero_stage >= 1)."""
    log_every: int = 20
    """Steps between metric lines."""
    valid_every: int = 0
    """Steps between validations at k_max; 0 for none before the end."""
    save_every: int = 0
    """Steps between checkpoints; 0 for one at the end only."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    resume: bool = False
    """Go on from the newest whole checkpoint of this run's folder."""
    threads: int = 0
    """CPU threads of PyTorch; 0 leaves its default."""

    def __post_init__(self) -> None:
        _at_least("train", self, steps=1, seed=0, accumulation=1, log_every=1, valid_every=0)
        _at_least("train", self, save_every=0, keep=1, threads=0)
        require(self.seed < 2**32, f"train.seed={self.seed}: must be below 2**32")
        require(
            self.zero_stage in (0, 1, 2, 3),
            f"train.zero_stage={self.zero_stage}: must be 0, 1, 2 or 3",
        )
        require(
            not self.offload or self.zero_stage >= 1,
            f"train.offload=true: needs train.zero_stage=1, 2 or 3, it is {self.zero_stage}",
        )
        require(
            bool(self.name) and "/" not in self.name and not self.name.startswith("."),
            f"train.name={self.name!r}: must be a plain folder name",
        )


@dataclass
class EvalConfig:
    """Held-out bits per symbol."""

    k: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Numbers of active experts to evaluate."""
    split: Split = Split.test
    streams: int = 8
    """Contiguous shares of the split; changes speed, not the result (warm-up covers the cuts)."""
    segment: int | None = None
    """Symbols per forward pass; None means data.segment."""
    memory: int | None = None
    """Memory length; None means model.memory."""
    clamp_len: int = 0
    """Distances beyond this count as this; 0 for no clamp."""
    same_length: bool = False
    """Every symbol sees exactly `memory` positions."""
    max_symbols: int = 0
    """Evaluate only the first so many symbols of the split; 0 for all."""

    def __post_init__(self) -> None:
        _at_least("eval", self, streams=1, clamp_len=0, max_symbols=0)
        for name in ("segment", "memory"):
            value = getattr(self, name)
            low = 1 if name == "segment" else 0
            require(value is None or value >= low, f"eval.{name}={value}: must be at least {low}")
        require(
            len(self.k) > 0 and min(self.k) >= 1, f"eval.k={self.k}: needs one or more k, each >= 1"
        )


@dataclass
class KernelsConfig:
    """How the expert layer is executed."""

    backend: Backend = Backend.auto
    """Who computes: cpu, triton, or reference (plain loops, slow)."""
    masked_from_k: int | None = None
    """From this k on, one dense product with inactive experts masked replaces the grouped products (backend cpu). None:
    measured once at the start of the run and written into its resolved config."""
    mode: Kept = Kept.lean
    """What is kept for backward: lean, or fast (backend cpu), which also keeps the gathered input rows."""
    precision: Products = Products.ieee
    """How fp32 is multiplied: ieee, or tf32 (backend triton), with 10 bits of mantissa on tensor cores."""
    debug: bool = False
    """Check every row index of every layer on the host: slow, for hunting a fault."""

    def __post_init__(self) -> None:
        require(
            self.masked_from_k is None or self.masked_from_k >= 1,
            f"kernels.masked_from_k={self.masked_from_k}: must be at least 1",
        )
        require(
            self.mode is Kept.lean or self.backend in (Backend.cpu, Backend.auto),
            f"kernels.mode=fast: kernels.backend={self.backend.value} has only lean",
        )
        require(
            self.precision is Products.ieee or self.backend is Backend.triton,
            f"kernels.precision=tf32: needs kernels.backend=triton, it is {self.backend.value}",
        )


@dataclass
class ParallelConfig:
    """Many ranks: world = data x expert groups (engine/parallel/mesh.py)."""

    expert_ranks: int = 1
    """Ranks of an expert group: each holds moe.experts / expert_ranks experts; must divide the world."""
    exchange: ExchangeKind = ExchangeKind.tokens
    link_gb_per_s: float = 50.0
    """For exchange=auto: what a rank sends to other ranks, in 1e9 bytes per second; 50 is a port of 400 Gbit/s."""
    message_us: float = 5.0
    """For exchange=auto: microseconds that a message costs whatever its size; more favours gather, which needs fewer."""
    memory_gb_per_s: float = 2000.0
    """For exchange=auto: memory bandwidth for packing rows, in 1e9 bytes per second; 2000 is a recent GPU's."""
    wire: WireFormat = WireFormat.model
    chunks: int = 1
    """Parts of a micro-batch that are exchanged one behind the other, so that rows travel while experts compute. 1 is off."""
    peer_ids: PeerIds = PeerIds.corpus
    timeout_s: float = 120.0
    """Seconds without a sign of life after which a rank counts as lost and the others end."""

    def __post_init__(self) -> None:
        _at_least("parallel", self, expert_ranks=1, chunks=1, timeout_s=1, message_us=0)
        for name in ("link_gb_per_s", "memory_gb_per_s"):
            require(
                getattr(self, name) > 0, f"parallel.{name}={getattr(self, name)}: must be above 0"
            )


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: WandbMode = WandbMode.disabled
    project: str = "foreroute"
    group: str | None = None


@dataclass
class Config:
    """Everything that defines a run."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        experts, k_max = self.moe.experts, self.schedule.k_max
        if self.moe.router is not Router.dense:
            require(
                k_max <= experts, f"schedule.k_max={k_max}: must be at most moe.experts={experts}"
            )
            too_big = [k for k in self.eval.k if k > experts]
            require(not too_big, f"eval.k={too_big}: must be at most moe.experts={experts}")
        require(
            self.optim.warmup_steps <= self.train.steps,
            f"optim.warmup_steps={self.optim.warmup_steps}: must be at most train.steps={self.train.steps}",
        )
        memory = self.model.memory if self.eval.memory is None else self.eval.memory
        require(
            not self.eval.same_length or memory >= 1,
            f"eval.same_length=true: needs a memory of at least 1, it is {memory}",
        )
        require(
            self.parallel.chunks == 1 or self.kernels.backend is not Backend.reference,
            f"parallel.chunks={self.parallel.chunks}: kernels.backend=reference has only 1",
        )
        self.streams_per_micro_batch(world=1)

    def streams_per_micro_batch(self, world: int) -> int:
        """Streams that one rank runs in one forward pass.

        Raises:
            UserError: data.streams is no multiple of world x accumulation.
        """
        parts = world * self.train.accumulation
        require(
            self.data.streams % parts == 0,
            f"data.streams={self.data.streams}: must be a multiple of world x train.accumulation = "
            f"{world} x {self.train.accumulation}",
        )
        return self.data.streams // parts

    def alone(self) -> "Config":
        """The run's configuration alone, of a program's options that extend it."""
        return Config(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Config)})

    @property
    def symbols_per_step(self) -> int:
        """Training symbols consumed by one optimizer step over all ranks."""
        return self.data.streams * self.data.segment

    @property
    def context(self) -> int:
        """Ids left of a segment that the router's keys need: n - 1 for hashed routers, else 0."""
        return self.moe.ngram - 1 if self.moe.router is Router.hashed else 0

    @property
    def schedule_steps(self) -> int:
        """Steps over which k grows."""
        return self.schedule.steps or self.train.steps


def to_plain(config: object) -> Any:
    """Turn a config object into dicts, lists, numbers and strings (enums by name), for YAML or JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, list):
        return [to_plain(item) for item in config]
    return config
