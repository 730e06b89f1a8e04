"""The run's configuration as validated dataclasses; the schema that the Hydra files in conf/ fill in.

Each help text has the unit of its option and the effect of a larger value. Everything is checked here, at start-up. The
rest of the engine receives these plain objects and trusts them. Derived numbers are properties.
"""

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from foreroute.engine.config.enums import (
    Backend,
    Collectives,
    Corpus,
    Decay,
    ExchangeKind,
    Growth,
    MatmulPrecision,
    PeerIds,
    Precision,
    RouteWeights,
    SavedForBackward,
    Split,
    Tokens,
    WandbMode,
    WireFormat,
)
from foreroute.engine.config.model import (
    ModelConfig,
    MoEConfig,
    expert_layers,
    expert_sections,
    feed_forward_width,
    num_tables,
)
from foreroute.engine.config.ngram_tables import NgramTablesConfig, dense_table
from foreroute.engine.config.option import check, option
from foreroute.engine.errors import require


@dataclass
class CorpusConfig:
    """Text and how it is cut into symbols."""

    name: Corpus = Corpus.stdlib
    path: Any = option(
        None,
        'What to read: a file, a folder, a pattern such as "data/*.jsonl.zst", or a list of these; gzip and zstd are'
        " unpacked. Required for `file`; for `enwik8` a local copy, whole or a prefix of it.",
    )
    tokens: Tokens = Tokens.bytes
    cache_dir: str = option(".cache", "Folder of prepared corpora and tables; safe to delete.")
    valid_path: Any = option(
        None, "Of the valid split, where it has files of its own; path is then the training split."
    )
    test_path: Any = option(None, "Of the test split, where it has files of its own.")
    proportions: list[int] = option(
        [90, 5, 5], "Of train, valid and test, in the order of the text, where the splits have no files of their own."
    )
    weights: list[int] | None = option(
        None,
        "Of a mixture: how often each entry of the list corpus.path is read, such as [7,3]; None reads them one after"
        " the other.",
    )
    stretch: int = option(
        8192, "Of a mixture: symbols that are read of one corpus before the next; fewer mix more finely.", at_least=1
    )
    field: str | None = option(
        None,
        "Field of JSON lines that holds the text; None is text. Files named .jsonl are JSON lines, and all files are"
        " where this is given.",
    )
    dtype: str | None = option(None, "For tokens=ids and file: the number format of raw files of ids, such as uint16.")
    vocab_size: int | None = option(
        None,
        "For tokens=bpe: ids to learn (None: 8192); word: ids at most (None: all words); ids: their number (None: what"
        " occurs).",
        at_least=2,
    )
    tokenizer: str | None = option(None, "For tokens=file: the tokenizer.json.")
    document_end: int | None = option(
        None,
        "Id that is the last of each document, with tokens=bytes a byte such as 10, the newline; files and JSON lines "
        "are documents without it. Keys of n-grams stop at document ends, and with data.reset_memory attention does.",
        at_least=0,
    )

    def __post_init__(self) -> None:
        check("corpus", self)
        require(
            self.name in (Corpus.stdlib, Corpus.enwik8) or bool(self.path),
            f"corpus.path is missing: corpus={self.name.name} needs corpus.path=FILE",
        )
        require(
            not (self.name is Corpus.stdlib and self.path),
            f"corpus.path={self.path}: corpus=stdlib takes no path (use corpus=file)",
        )
        self._check_paths()
        self._check_tokens()

    def _check_paths(self) -> None:
        for name in ("path", "valid_path", "test_path"):
            value = getattr(self, name)
            good = value is None or isinstance(value, str) or (isinstance(value, list) and bool(value))
            good = good and all(isinstance(item, str) for item in value or [])
            require(good, f"corpus.{name}={value}: must be a path or a list of paths")
        own = [name for name in ("valid_path", "test_path") if getattr(self, name) is not None]
        require(
            len(own) != 1, f"corpus.{own[:1]} is given alone: corpus.valid_path and corpus.test_path belong together"
        )
        require(not own or self.name is Corpus.file, f"corpus.valid_path={self.valid_path}: needs corpus=file")
        if self.weights is not None:
            words = f"corpus.weights={self.weights}"
            number = len(self.path) if isinstance(self.path, list) else 0
            require(number == len(self.weights) and not own, f"{words}: needs as many entries in a list corpus.path")
            require(
                min(self.weights) >= 1 and sum(self.weights) <= 10**6,
                f"{words}: must be whole numbers of at least 1, together at most 1,000,000",
            )
        require(
            len(self.proportions) == 3 and min(self.proportions) >= 1 and sum(self.proportions) < 2**31,
            f"corpus.proportions={self.proportions}: must be three numbers of at least 1, such as [90,5,5]",
        )

    def _check_tokens(self) -> None:
        tokens, ready = self.tokens, self.tokens in (Tokens.ids, Tokens.file)
        require(
            not ready or self.name is Corpus.file,
            f"corpus.tokens={tokens.name}: needs corpus=file, not {self.name.name}",
        )
        require(
            self.field is None or (self.name is Corpus.file and tokens is not Tokens.ids),
            f"corpus.field={self.field}: needs corpus=file with files of text",
        )
        for name, users in (("dtype", "ids or file"), ("tokenizer", "file"), ("vocab_size", "bpe, word or ids")):
            value = getattr(self, name)
            require(
                value is None or tokens.name in users.replace(" or", ",").split(", "),
                f"corpus.{name}={value}: needs corpus.tokens={users}, it is {tokens.name}",
            )
        require(
            tokens is not Tokens.file or self.tokenizer is not None,
            "corpus.tokenizer is missing: corpus.tokens=file needs corpus.tokenizer=FILE, a tokenizer.json",
        )
        require(
            self.dtype in (None, "uint8", "uint16", "uint32", "int16", "int32", "int64"),
            f"corpus.dtype={self.dtype}: must be uint8, uint16, uint32, int16, int32 or int64",
        )
        least = {Tokens.bpe: 257, Tokens.word: 3}.get(tokens, 2)
        require(
            self.vocab_size is None or least <= self.vocab_size < 2**31,
            f"corpus.vocab_size={self.vocab_size}: must be from {least} to 2**31 - 1 for corpus.tokens={tokens.name}",
        )


@dataclass
class DataConfig:
    """Layout of the training stream (engine/data/streams.py)."""

    streams: int = option(
        22, "Contiguous streams over all ranks; = world x accumulation x streams per micro-batch.", at_least=1
    )
    segment: int = option(512, "Symbols per stream and step (Q).", at_least=1)
    prefetch: int = option(2, "Batches planned ahead of the step by the background worker.", at_least=1)
    start: float = option(
        0.0,
        "Where in its stream each stream begins, as a fraction in [0, 1): another order of the same text; it goes on "
        "at the stream's beginning after its end.",
        at_least=0,
        below=1,
    )
    reset_memory: bool = option(
        False,
        "Let attention and memory stop at document starts: documents do not see each other. Needs a text whose "
        "documents have a known end.",
    )

    def __post_init__(self) -> None:
        check("data", self)


@dataclass
class ScheduleConfig:
    """Number of active experts k over optimizer steps."""

    growth: Growth = Growth.constant
    k_min: int = option(4, "k of the first step, where it grows.", at_least=1)
    k_max: int = option(
        4, "Largest k in training; the k of `constant`, which ignores k_min. May stay below moe.experts.", at_least=1
    )
    steps: int | None = option(None, "Steps over which k grows; None means train.steps.", at_least=1)

    def __post_init__(self) -> None:
        check("schedule", self)
        require(
            self.growth is Growth.constant or self.k_min <= self.k_max,
            f"schedule.k_min={self.k_min}: must be at most schedule.k_max={self.k_max}",
        )
        require(
            self.growth is not Growth.multi_step or self.k_max <= 16,
            f"schedule.k_max={self.k_max}: schedule.growth=multi_step is 1, 2, 4, 8, 16 as published, at most 16;"
            " doubling has any end",
        )


@dataclass
class OptimConfig:
    """Adam with warm-up and decay to final_lr."""

    lr: float = option(2.5e-4, "Learning rate after warm-up, the largest of the run.", at_least=0)
    beta1: float = option(0.9, "Decay of the mean of gradients.", at_least=0, below=1)
    beta2: float = option(0.999, "Decay of the mean of squared gradients.", at_least=0, below=1)
    eps: float = option(
        1e-8, "Added to the root of the mean of squares; larger shortens the steps of rare weights.", at_least=0
    )
    weight_decay: float = option(0.0, "Decoupled (AdamW); 0 is plain Adam.", at_least=0)
    clip: float = option(0.25, "Largest global gradient norm; 0 turns clipping off.", at_least=0)
    warmup_steps: int = option(0, "Steps over which the learning rate rises to lr.", at_least=0)
    decay: Decay = Decay.cosine
    final_lr: float = option(0.0, "Learning rate of the last step, where it decays.", at_least=0)

    def __post_init__(self) -> None:
        check("optim", self)


@dataclass
class TrainConfig:
    """The training loop."""

    name: str = option("run", "Name of the run; its folder is runs_dir/name.")
    runs_dir: str = option("runs", "Folder of run folders; many machines must share it.")
    steps: int = option(1000, "Optimizer steps.", at_least=1)
    seed: int = option(1111, "Of initial weights, dropout and tables, below 2**32.", at_least=0)
    precision: Precision = Precision.fp32
    accumulation: int = option(1, "Micro-batches per optimizer step; splits streams, never time.", at_least=1)
    recompute: bool = option(
        False, "Activation checkpointing: keep one tensor per layer, compute the rest again in backward."
    )
    zero_stage: int = option(
        1,
        "DeepSpeed ZeRO stage: what is shared out over the ranks. 0 nothing, 1 the optimizer's state, 2 also "
        "gradients, 3 also weights.",
        at_least=0,
        at_most=3,
    )
    offload: bool = option(
        False,
        "Keep the optimizer's state, and update the weights, in host memory: slower, frees device memory (zero_stage "
        ">= 1).",
    )
    log_every: int = option(20, "Steps between metric lines.", at_least=1)
    valid_every: int = option(0, "Steps between validations at k_max; 0 for none before the end.", at_least=0)
    valid_symbols: int = option(
        0,
        "A validation takes only the first so many symbols of the split; 0 for as many as eval.max_symbols.",
        at_least=0,
    )
    save_every: int = option(
        0, "Steps between checkpoints; 0 for none by steps. There is always one at the end.", at_least=0
    )
    save_minutes: float = option(
        10.0, "Minutes after which a checkpoint is written if none was in that time; 0 for none by time.", at_least=0
    )
    keep: int = option(2, "Newest checkpoints that are kept.", at_least=1)
    resume: bool = option(False, "Go on from the newest whole checkpoint of this run's folder.")
    threads: int = option(0, "CPU threads of PyTorch; 0 leaves its default.", at_least=0)
    peak_tflops: float | None = option(
        None,
        "For the metric mfu: what one rank's device reaches at most, in 1e12 FLOP/s of dense products in this run's "
        "number format. None: by the data sheet of a known GPU, else unknown, and mfu is 0; benchmarks.calibrate "
        "measures a CPU.",
        above=0,
    )

    def __post_init__(self) -> None:
        check("train", self)
        require(self.seed < 2**32, f"train.seed={self.seed}: must be below 2**32")
        require(
            not self.offload or self.zero_stage >= 1,
            f"train.offload=true: needs train.zero_stage=1, 2 or 3, it is {self.zero_stage}",
        )
        size = len(self.name.encode(errors="surrogateescape"))
        require(size <= 255, f"train.name: a folder's name takes 255 bytes, it has {size}")
        require(
            bool(self.name) and "/" not in self.name and not self.name.startswith("."),
            f"train.name={self.name!r}: must be a plain folder name",
        )


@dataclass
class EvalConfig:
    """Held-out bits per symbol."""

    k: list[int] = option([1, 2, 4, 8, 16], "Numbers of active experts to evaluate.")
    split: Split = Split.test
    streams: int = option(
        8, "Contiguous shares of the split; changes speed, not the result (warm-up covers the cuts).", at_least=1
    )
    segment: int | None = option(None, "Symbols per forward pass; None means data.segment.", at_least=1)
    memory: int | None = option(None, "Memory length; None means model.memory.", at_least=0)
    clamp_len: int = option(0, "Distances beyond this count as this; 0 for no clamp.", at_least=0)
    same_length: bool = option(False, "Every symbol sees exactly `memory` positions.")
    max_symbols: int = option(
        0,
        "Evaluate only the first so many symbols of the split, and fit the counting models on at most 100 times as "
        "many; 0 for all.",
        at_least=0,
    )

    def __post_init__(self) -> None:
        check("eval", self)
        require(len(self.k) > 0 and min(self.k) >= 1, f"eval.k={self.k}: needs one or more k, each >= 1")


@dataclass
class KernelsConfig:
    """How the expert layer is executed."""

    backend: Backend = option(Backend.auto, "Who computes: cpu, triton, or reference (plain loops, slow).")
    masked_from_k: int | None = option(
        None,
        "From this k on, one dense product with inactive experts masked replaces the grouped products (backend cpu). "
        "None: measured once at the start of the run and written into its resolved config.",
        at_least=1,
    )
    mode: SavedForBackward = option(
        SavedForBackward.lean,
        "What is kept for backward: lean, or fast (backend cpu), which also keeps the gathered token rows.",
    )
    precision: MatmulPrecision = option(
        MatmulPrecision.ieee,
        "How fp32 is multiplied: ieee, or tf32 (backend triton), with 10 bits of mantissa on tensor cores.",
    )
    debug: bool = option(False, "Check every row index of every layer on the host: slow, for hunting a fault.")

    def __post_init__(self) -> None:
        check("kernels", self)
        require(
            self.mode is SavedForBackward.lean or self.backend in (Backend.cpu, Backend.auto),
            f"kernels.mode=fast: kernels.backend={self.backend.value} has only lean",
        )
        require(
            self.precision is MatmulPrecision.ieee or self.backend is Backend.triton,
            f"kernels.precision=tf32: needs kernels.backend=triton, it is {self.backend.value}",
        )


@dataclass
class ParallelConfig:
    """Many ranks: world = data x expert groups."""

    expert_ranks: int = option(
        1, "Ranks of an expert group: each holds moe.experts / expert_ranks experts; must divide the world.", at_least=1
    )
    exchange: ExchangeKind = ExchangeKind.tokens
    link_gb_per_s: float = option(
        50.0,
        "For exchange=auto: what a rank sends to other ranks, in 1e9 bytes per second; 50 is a port of 400 Gbit/s.",
        above=0,
    )
    message_us: float = option(
        5.0,
        "For exchange=auto: microseconds that a message costs whatever its size; more favours gather, which needs "
        "fewer.",
        at_least=0,
    )
    memory_gb_per_s: float = option(
        2000.0,
        "For exchange=auto: memory bandwidth for packing rows, in 1e9 bytes per second; 2000 is a recent GPU's.",
        above=0,
    )
    wire: WireFormat = WireFormat.model
    chunks: int = option(
        1,
        "Chunks of a micro-batch that are exchanged one after the other, so that rows travel while experts compute. "
        "1 is off.",
        at_least=1,
    )
    peer_ids: PeerIds = PeerIds.corpus
    collectives: Collectives = Collectives.nccl
    timeout_s: float = option(
        120.0, "Seconds without a sign of life after which a rank counts as lost and the others end.", at_least=1
    )
    meet_s: float = option(
        30.0,
        "Seconds that a rank waits at the start for the others to come; more where some load PyTorch from a slow disk.",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check("parallel", self)
        for name in ("timeout_s", "meet_s"):
            seconds = getattr(self, name)
            require(seconds < 2e6, f"parallel.{name}={seconds}: must be below 2e6, 23 days")


def check_project(option: str, name: str) -> None:
    """Refuse a project's name that W&B would refuse."""
    require(
        0 < len(name) <= 128 and not set(name) & set("/\\#?%:"),
        f"{option}={name[:128]!r}: W&B takes 1 to 128 letters, none of / \\ # ? % :",
    )


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: WandbMode = WandbMode.disabled
    project: str = option("foreroute", "Project of the run on W&B.")
    group: str | None = option(None, "None: in a sweep the sweep's name, else no group.")
    job_type: str = option("train", "Kind of the run, by which W&B can group.")
    tags: list[str] = option([], "Words to find the run by.")
    notes: str | None = option(None, "Free text beside the run.")

    def __post_init__(self) -> None:
        check("wandb", self)
        if self.mode is WandbMode.disabled:
            return
        for tag in self.tags:
            require(1 <= len(tag) <= 64, f"wandb.tags={tag[:64]!r}: W&B takes 1 to 64 letters, it has {len(tag)}")
        check_project("wandb.project", self.project)
        for name in ("group", "job_type"):
            value = getattr(self, name) or ""
            require(len(value) <= 128, f"wandb.{name}: W&B takes 128 letters, it has {len(value)}")


@dataclass
class ProfileConfig:
    """A trace of a few steps (engine/profiling/profiler.py)."""

    steps: list[int] | None = option(
        None, "First and last step traced, counted from 1 as the console does; None is off."
    )
    operators: bool = option(
        True, "Also PyTorch's operators and a GPU's kernels; false disturbs the traced steps less."
    )

    def __post_init__(self) -> None:
        steps = self.steps
        require(
            steps is None or (len(steps) == 2 and 1 <= steps[0] <= steps[1]),
            f"profile.steps={steps}: must be the first and the last step, such as [5,8], counted from 1",
        )


@dataclass
class Config:
    """Everything that defines a run."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    ngram_tables: NgramTablesConfig = field(default_factory=NgramTablesConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        check("", self)
        k_max = self.schedule.k_max
        experts, layer = min((moe.columns, layer) for layer, moe in enumerate(self.expert_sections))
        name = "moe.experts"
        if self.moe.by_layer:
            name = f"moe.by_layer.{expert_layers(self.model, self.moe)[layer]}.experts"
        if self.moe.strata > 1:  # a token has one expert in each
            experts, name = self.moe.strata, "moe.strata"
            require(self.model.pre_norm, f"moe.strata={experts}: needs model.pre_norm=true")
        if not self.moe.dense or self.model.signatures:
            require(k_max <= experts, f"schedule.k_max={k_max}: must be at most {name}={experts}")
        if self.moe.dense:
            tf32 = self.kernels.precision is MatmulPrecision.tf32
            require(not tf32, "kernels.precision=tf32: moe.router=dense has no expert kernels")
        else:
            too_big = [k for k in self.eval.k if k > experts]
            require(not too_big, f"eval.k={too_big}: must be at most {name}={experts}")
        require(
            self.optim.warmup_steps <= self.train.steps,
            f"optim.warmup_steps={self.optim.warmup_steps}: must be at most train.steps={self.train.steps}; "
            f"give optim.warmup_steps={self.train.steps} or fewer, or optim.warmup_steps=0",
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
        require(
            self.profile.steps is None or self.profile.steps[1] <= self.train.steps,
            f"profile.steps={self.profile.steps}: must end by train.steps={self.train.steps}",
        )
        self._check_input()
        self.streams_per_micro_batch(world=1)

    def _check_input(self) -> None:
        """Check the tables at the model's input, and which layers have experts."""
        model, moe = self.model, self.moe
        dense_table(model, self.ngram_tables)  # refuses two tables there
        dense = moe.dense
        require(
            dense or not model.signatures,
            f"model.signatures={model.signatures}: needs moe.router=dense, it is {moe.router}",
        )
        require(
            not model.signatures or moe.weights is not RouteWeights.live,
            "model.signatures=true: needs fixed weights, moe.weights is live",
        )
        if isinstance(moe.layers, list):
            require(
                moe.layers[-1] < model.layers,
                f"moe.layers={moe.layers}: must be below model.layers={model.layers}, since they count from 0",
            )
        elif moe.layers is not None:
            require(moe.layers <= model.layers, f"moe.layers={moe.layers}: must be at most model.layers={model.layers}")
        for layer in moe.by_layer:
            words = f"moe.by_layer.{layer}: must be one of the layers that have experts, from 0 to {model.layers - 1}"
            require(int(layer) in expert_layers(model, moe), words)
        deepest = max(self.ngram_tables.layers, default=0)
        require(
            deepest < model.layers,
            f"ngram_tables.layers={self.ngram_tables.layers}: must be below model.layers={model.layers}, since they"
            " count from 0",
        )
        if dense:
            feed_forward_width(model, moe, expert_layers(model, moe)[0])

    def streams_per_micro_batch(self, world: int) -> int:
        """Count the streams that one rank runs in one forward pass.

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
        """Return the run's configuration without the options of a program that extends it."""
        return Config(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Config)})

    @property
    def symbols_per_step(self) -> int:
        """Training symbols consumed by one optimizer step over all ranks."""
        return self.data.streams * self.data.segment

    @property
    def context(self) -> int:
        """Ids left of a segment that the n-grams of router and input may need: n - 1 of the longer ones."""
        keyed = not self.moe.dense or self.model.signatures
        ngrams = [section.ngram for section in self.expert_sections] if keyed else []
        return max(max([self.model.ngram, 1, *ngrams]) - 1, self.ngram_tables.context)

    @property
    def dense_table(self) -> NgramTablesConfig | None:
        """The section of the dense n-gram table at the model's input; None: there is none."""
        return dense_table(self.model, self.ngram_tables)

    @property
    def expert_layers(self) -> int:
        """How many expert layers there are or, with router=dense, layers that are as wide; each stratum is one."""
        return len(expert_layers(self.model, self.moe)) * self.moe.strata

    @property
    def expert_sections(self) -> list[MoEConfig]:
        """The section `moe` of each expert layer."""
        return expert_sections(self.model, self.moe)

    @property
    def num_tables(self) -> int:
        """Tables of the run's hashed routing, or orders that a router draws at each pass."""
        return num_tables(self.model, self.moe)

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
