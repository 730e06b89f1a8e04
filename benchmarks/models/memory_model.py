"""Predicted against measured memory: `python -m benchmarks.models.memory_model`, and as a part of `python -m
benchmarks.bench_certify`.

Each case is a small run of a few steps in processes of its own, on 1, 2 or 4 gloo ranks. Its tensors are counted as
PyTorch allocates them (engine/testing/tensor_bytes.py) and compared with engine/certificate/memory/peak.py, for the
rank with the most. Then one larger run on one rank is not counted: its figure is the growth of the process from before
the model is built to its peak. The interpreter, libraries and threads grow it too, so that figure is above the tensors'
bytes.

`memory_model_error` is the median over the cases of |predicted - measured| / measured.
"""

import argparse
import resource
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from benchmarks.harness import environment, positive, print_result, print_table
from foreroute.engine.certificate.counts.exact import certify
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.memory.peak import Memory, peak_memory
from foreroute.engine.config import (
    Activation,
    Config,
    DataConfig,
    EvalConfig,
    ExchangeKind,
    KernelsConfig,
    ModelConfig,
    MoEConfig,
    NgramTablesConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    SavedForBackward,
    ScheduleConfig,
    TrainConfig,
)
from foreroute.engine.ngram_tables.tables import table_keys
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import RouterInputs
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.tensor_bytes import train
from foreroute.launch.start.process import keep_freed_memory

SYMBOLS, STEPS = 64, 3
SMALL = {
    "data": {"streams": 4, "segment": 128},
    "model": {"layers": 2, "width": 128, "heads": 4, "head_width": 32, "memory": 128},
    "moe": {"experts": 8, "expert_width": 256, "ngram": 2, "rows": 512},
    "schedule": {"k_min": 2, "k_max": 2},
    "train": {"steps": STEPS},
}
"""Every case changes some of this."""

GROWTH = {
    "data": {"streams": 4, "segment": 512},
    "model": {"layers": 4, "width": 512, "heads": 8, "head_width": 64, "memory": 512},
    "moe": {"experts": 16, "expert_width": 512, "ngram": 3, "rows": 4096},
    "schedule": {"k_min": 4, "k_max": 4},
    "train": {"steps": 2},
}
"""Whose process grows by more than 1 GB."""


class Case(NamedTuple):
    """A run."""

    ranks: int
    changes: dict[str, dict[str, Any]]  # by section of the configuration
    symbols: int = SYMBOLS  # of the model; the text has the first SYMBOLS of them


def _case(ranks: int, *, symbols: int = SYMBOLS, **changes: Any) -> Case:
    """Make a case from options by their own names, which differ between sections."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, option = _SECTION[name]
        found.setdefault(section, {})[option] = value
    return Case(ranks, found, symbols)


_SECTION = {
    "streams": ("data", "streams"),
    "layers": ("model", "layers"),
    "memory": ("model", "memory"),
    "ngram": ("model", "ngram"),
    "ngram_rows": ("model", "ngram_rows"),
    "dropout": ("model", "dropout"),
    "pre_norm": ("model", "pre_norm"),
    "cutoffs": ("model", "cutoffs"),
    "div_val": ("model", "div_val"),
    "attention_dropout": ("model", "attention_dropout"),
    "expert_width": ("moe", "expert_width"),
    "shared_width": ("moe", "shared_width"),
    "activation": ("moe", "activation"),
    "weights": ("moe", "weights"),
    "gate": ("moe", "gate"),
    "constant_experts": ("moe", "constant_experts"),
    "copy_experts": ("moe", "copy_experts"),
    "residual": ("moe", "residual"),
    "rows": ("ngram_tables", "rows"),
    "layers_of_rows": ("ngram_tables", "layers"),
    "moments": ("ngram_tables", "moments"),
    "k": ("schedule", "k_max"),
    "zero": ("train", "zero_stage"),
    "precision": ("train", "precision"),
    "accumulation": ("train", "accumulation"),
    "recompute": ("train", "recompute"),
    "offload": ("train", "offload"),
    "masked_from_k": ("kernels", "masked_from_k"),
    "mode": ("kernels", "mode"),
    "group": ("parallel", "expert_ranks"),
    "exchange": ("parallel", "exchange"),
    "chunks": ("parallel", "chunks"),
}
_BF16, _GATHER = Precision.bf16, ExchangeKind.gather
CASES = (
    _case(1),
    _case(2, group=2, zero=3),
    _case(1, zero=0, layers=4),
    _case(1, zero=2),
    _case(1, zero=3),
    _case(1, precision=_BF16),
    _case(1, precision=_BF16, zero=2),
    _case(1, precision=_BF16, zero=3),
    _case(1, recompute=True),
    _case(1, accumulation=2),
    _case(1, dropout=0.0),
    _case(1, attention_dropout=0.1),
    _case(1, masked_from_k=1),
    _case(1, k=8),
    _case(1, mode=SavedForBackward.fast),
    _case(1, activation=Activation.swiglu),
    _case(1, activation=Activation.gelu),
    _case(1, shared_width=128, pre_norm=True),
    _case(1, shared_width=128, residual=True),
    _case(1, constant_experts=2, copy_experts=1),
    _case(1, memory=256),
    _case(1, ngram=2),
    _case(1, ngram=2, ngram_rows=30_000, accumulation=2),
    _case(1, rows=20_000),
    _case(2, rows=20_000, layers_of_rows=[0, 1], moments="row", accumulation=2),
    _case(1, memory=64, streams=8, layers=6, expert_width=64),
    _case(1, offload=True),
    _case(1, offload=True, precision=_BF16, zero=2),
    _case(2),
    _case(2, zero=3),
    _case(2, accumulation=2),
    _case(2, group=2),
    _case(2, group=2, zero=0),
    _case(2, group=2, zero=2, precision=_BF16),
    _case(2, group=2, zero=3, precision=_BF16),
    _case(2, group=2, exchange=_GATHER, k=6),
    _case(2, group=2, chunks=3),
    _case(2, group=2, chunks=3, precision=_BF16),
    _case(2, group=2, weights="live"),
    _case(2, group=2, weights="live", gate="sqrt_softplus", precision=_BF16),
    _case(2, group=2, weights="live", gate="sqrt_softplus", precision=_BF16, chunks=3),
    _case(2, group=2, recompute=True, accumulation=2),
    _case(2, group=2, ngram=2, zero=2),
    _case(4, group=2),
    _case(4, group=2, zero=2),
    _case(4, group=4),
    _case(4, group=4, zero=3),
    *(_case(1, symbols=8192, zero=zero) for zero in (1, 2, 3)),
    _case(1, symbols=8192, precision=_BF16, zero=2),
    _case(2, symbols=8192, group=2, zero=1),
    _case(1, symbols=8192, cutoffs=[1000, 3000]),
    _case(1, symbols=8192, cutoffs=[1000, 3000], div_val=4, streams=8),
)


class Outcome(NamedTuple):
    """Bytes of one case."""

    case: Case
    predicted: Memory
    measured: int

    @property
    def error(self) -> float:
        """Relative error."""
        return self.predicted.peak_bytes / self.measured - 1


def make_config(changes: dict[str, dict[str, Any]], base: dict[str, dict[str, Any]]) -> Config:
    """Return a run's configuration: the base's options, changed."""
    merged = {name: {**base.get(name, {}), **changes.get(name, {})} for name in {*base, *changes}}
    train = TrainConfig(**merged["train"])
    return Config(
        data=DataConfig(**merged["data"]),
        model=ModelConfig(**merged["model"]),
        moe=MoEConfig(**merged["moe"]),
        ngram_tables=NgramTablesConfig(**merged.get("ngram_tables", {})),
        schedule=ScheduleConfig(**merged["schedule"]),
        optim=OptimConfig(clip=0.25 if train.zero_stage else 0.0),
        train=train,
        eval=EvalConfig(k=[1]),
        kernels=KernelsConfig(**merged.get("kernels", {})),
        parallel=ParallelConfig(**merged.get("parallel", {})),
    )


def material(layout: Layout, symbols: int = SYMBOLS) -> tuple[NDArray[np.uint8], Sequence[HashedRouter]]:
    """Make a text of random symbols, skewed so that experts differ in their rows, and the tables; none if it is dense.

    Args:
        symbols: of the model; the text has the first SYMBOLS of them.
    """
    config = layout.config
    number = config.data.streams * (config.data.segment * (config.train.steps + 1) + 1)
    ids = (np.random.default_rng(0).random(number) ** 2 * SYMBOLS).astype(np.uint8)
    routers = (
        [] if config.moe.dense else HashedRouter.build(config.moe, RouterInputs(symbols, 1, config.num_tables, ids))
    )
    return ids, routers


def make_layout(changes: dict[str, dict[str, Any]], base: dict[str, dict[str, Any]], ranks: int) -> Layout:
    """Lay a run out on the ranks of one node; as make_config."""
    config = make_config(changes, base)
    return Layout(config, Placement(ranks, config.parallel.expert_ranks, ranks))


def predicted(layout: Layout, symbols: int = SYMBOLS) -> Memory:
    """Predict a run's memory."""
    keys = table_keys(layout.config.ngram_tables, symbols, layout.config.train.seed)
    return peak_memory(layout, certify(layout, *material(layout, symbols), table_keys=keys), symbols)


def measured(rank: int, runs: Sequence[tuple[Layout, int]]) -> list[int]:
    """Run some layouts, each with its symbols, one after the other as one rank; return the most bytes of each."""
    return [train(layout, rank, *material(layout, symbols), symbols) for layout, symbols in runs]


def compare(cases: Sequence[Case]) -> list[Outcome]:
    """Measure and predict cases, those of one number of ranks in the same processes."""
    outcomes = []
    for ranks in sorted({case.ranks for case in cases}):
        own = [case for case in cases if case.ranks == ranks]
        runs = [(make_layout(case.changes, SMALL, ranks), case.symbols) for case in own]
        of_ranks = run_ranks(measured, ranks, runs, seconds=900)
        for case, run, *found in zip(own, runs, *of_ranks, strict=True):
            outcomes.append(Outcome(case, predicted(*run), max(found)))
    return outcomes


def grown(rank: int, layout: Layout) -> int:
    """Train on one rank; return the bytes that the process has at its peak above those before the model was built.

    A small run before it loads the libraries, whose memory is not predicted.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    small = Layout(make_config({}, SMALL))
    train(small, rank, *material(small), SYMBOLS, counted=False)
    text = material(layout)
    before = psutil.Process().memory_info().rss
    train(layout, rank, *text, SYMBOLS, counted=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def growth() -> tuple[int, int]:
    """Predict and measure the growth of a large run's process, in bytes."""
    layout = make_layout({}, GROWTH, 1)
    (found,) = run_ranks(grown, 1, layout, seconds=600)
    return predicted(layout).peak_bytes, found


def _row(name: str, when: str, guess: int, truth: int) -> list[object]:
    return [name, f"{guess / 1e6:,.2f}", f"{truth / 1e6:,.2f}", f"{guess / truth - 1:+.1%}", when]


def describe(case: Case) -> str:
    """Name a case by its ranks and changes."""
    changes = [
        f"{key}={getattr(value, 'name', value)}" for part in case.changes.values() for key, value in part.items()
    ]
    if case.symbols != SYMBOLS:
        changes.append(f"symbols={case.symbols}")
    return " ".join([f"{case.ranks} rank{'s' * (case.ranks > 1)}", *changes])


def memory_model_error(number: int | None = None) -> float:
    """Measure the cases (or the first so many) and the growth, print them, and return the cases' median relative
    error."""
    outcomes = compare(CASES[:number])
    rows = [_row(describe(one.case), one.predicted.when, one.predicted.peak_bytes, one.measured) for one in outcomes]
    if number is None:
        rows.append(_row("growth of a process, 1 rank", "", *growth()))
    print_table(["memory, MB (1e6)", "predicted", "measured", "error", "peak in"], rows)
    errors = [abs(one.error) for one in outcomes]
    print(f"largest error {max(errors):.1%}, {len(errors)} cases")
    return statistics.median(errors)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=positive, help="measure only the first so many")
    args = parser.parse_args()
    print(environment())
    print_result({"memory_model_error": memory_model_error(args.cases)})


if __name__ == "__main__":
    main()
