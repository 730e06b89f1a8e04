"""The configuration of a run, checked at start-up; the rest of the engine trusts it. Import from here."""

from foreroute.engine.config.enums import (
    Activation,
    Backend,
    BalanceOver,
    Builder,
    Collectives,
    Corpus,
    Decay,
    ExchangeKind,
    Gate,
    Growth,
    Keys,
    MatmulPrecision,
    PeerIds,
    Precision,
    RouteWeights,
    RowMoments,
    RowUpdates,
    SavedForBackward,
    Split,
    Tokens,
    WandbMode,
    WireFormat,
)
from foreroute.engine.config.model import ModelConfig, MoEConfig
from foreroute.engine.config.ngram_tables import NgramTablesConfig
from foreroute.engine.config.run import (
    Config,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    KernelsConfig,
    OptimConfig,
    ParallelConfig,
    ProfileConfig,
    ScheduleConfig,
    TrainConfig,
    WandbConfig,
    check_project,
    to_plain,
)
