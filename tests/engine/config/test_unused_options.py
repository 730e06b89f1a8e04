"""An option that is said to have no effect has none: two runs that differ in it alone end with the same weights, bit
for bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from foreroute.engine.config import (
    Backend,
    BalanceOver,
    Builder,
    Config,
    Corpus,
    CorpusConfig,
    DataConfig,
    Decay,
    EvalConfig,
    ExchangeKind,
    Gate,
    Growth,
    KernelsConfig,
    ModelConfig,
    MoEConfig,
    NgramEntry,
    NgramKeys,
    OptimConfig,
    PeerIds,
    RouteWeights,
    RowMoments,
    RowOptimizer,
    RowPlace,
    RowUpdates,
    SavedForBackward,
    ScheduleConfig,
    TrainConfig,
    WireFormat,
    to_plain,
)
from foreroute.engine.config.unused_options import Rule, rules, unused
from foreroute.engine.data.corpus import prepare
from foreroute.engine.model.build import build_routers
from foreroute.engine.routing.methods import idle_options, option_uses
from foreroute.engine.testing.routers import routers_without_files
from foreroute.engine.train.trainer import Trainer


class Silent:
    def note(self, line: str) -> None: ...
    def step(self, step: int) -> None: ...
    def metrics(self, step: int, values: Any, seconds_left: float) -> None: ...


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Any:
    generator = torch.Generator().manual_seed(3)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(torch.randint(97, 106, (4000,), generator=generator).tolist()))
    return path


def changed(config: Config, options: dict[str, Any]) -> Config:
    sections: dict[str, dict[str, Any]] = {}
    for full, value in options.items():
        section, name = full.split(".")
        sections.setdefault(section, {})[name] = value
    return replace(config, **{name: replace(getattr(config, name), **new) for name, new in sections.items()})


def small(text: Any, **options: Any) -> Config:
    config = Config(
        corpus=CorpusConfig(Corpus.file, str(text), cache_dir=str(text.parent / "cache")),
        data=DataConfig(streams=4, segment=8),
        model=ModelConfig(2, 16, heads=2, head_width=8, memory=8, dropout=0.0),
        moe=MoEConfig(experts=4, expert_width=12, ngram=2, rows=64),
        schedule=ScheduleConfig(k_min=2, k_max=2),
        optim=OptimConfig(lr=1e-2, clip=1.0),
        train=TrainConfig(steps=3, log_every=1),
        eval=EvalConfig(k=[1]),
        kernels=KernelsConfig(masked_from_k=4),
    )
    return changed(config, options)


def rules_of(config: Config) -> list[Rule]:
    return rules(config, option_uses(config.model, config.moe), idle_options(config.model, config.moe))


def weights(config: Config, folder: Any) -> list[torch.Tensor]:
    corpus = prepare(config.corpus)
    trainer = Trainer(config, corpus, build_routers(config, corpus), folder, Silent())
    trainer.run(None, lambda: False)
    return [p.detach().clone() for p in trainer.model.parameters()]


OTHER = {
    "schedule.growth": Growth.linear,
    "schedule.k_min": 1,
    "schedule.steps": 2,
    "schedule.k_max": 3,
    "eval.k": [1, 2],
    "kernels.backend": Backend.cpu,
    "kernels.mode": SavedForBackward.fast,
    "kernels.debug": True,
    "kernels.masked_from_k": 1,
    "parallel.exchange": ExchangeKind.gather,
    "parallel.wire": WireFormat.bf16,
    "parallel.chunks": 2,
    "parallel.peer_ids": PeerIds.exchange,
    "moe.ngram": 3,
    "moe.rows": 32,
    "moe.builder": Builder.packed,
    "moe.pack": 2,
    "moe.weights": RouteWeights.uniform,
    "moe.spread": 4.0,
    "moe.share_table": True,
    "moe.options": {"x": 1},
    "moe.gate": Gate.sigmoid,
    "moe.gate_normalised": False,
    "moe.gate_scale": 2.0,
    "moe.residual": True,
    "moe.balance_loss": 0.5,
    "moe.balance_over": BalanceOver.micro,
    "moe.z_loss": 0.5,
    "moe.consistency": 3.0,
    "moe.plain_width": 20,
    "model.ngram_rows": 30,
    "model.div_val": 2,
    "model.proj_init_std": 0.5,
    "optim.final_lr": 1e-3,
    "train.valid_symbols": 100,
    "ngram_tables.orders": [1],
    "ngram_tables.heads": 2,
    "ngram_tables.width": 8,
    "ngram_tables.layers": [1],
    "ngram_tables.entry": NgramEntry.gate,
    "ngram_tables.keys": NgramKeys.qwen,
    "ngram_tables.optimizer": RowOptimizer.dense,
    "ngram_tables.updates": RowUpdates.step,
    "ngram_tables.moments": RowMoments.row,
    "ngram_tables.lr_factor": 2.0,
    "ngram_tables.wire": WireFormat.bf16,
    "ngram_tables.place": RowPlace.host,
}
"""Another value of each option that a rule names, but of parallel.expert_ranks, which needs ranks."""

CASES: dict[str, dict[str, Any]] = {
    **{router: {"moe.router": router} for router in routers_without_files()},
    "adamoe": {"moe.router": "adamoe", "moe.null_experts": 2},
    "moe_plus_plus": {
        "moe.router": "moe_plus_plus",
        "moe.constant_experts": 1,
        "moe.copy_experts": 1,
        "moe.null_experts": 1,
    },
    "base": {"moe.router": "base", "schedule.k_min": 1, "schedule.k_max": 1, "eval.k": [1]},
    "dense": {"moe.router": "dense", "moe.shared_width": 8},
    "signatures": {"moe.router": "dense", "moe.shared_width": 8, "model.signatures": True},
    "uniform": {"moe.weights": RouteWeights.uniform},
    "live": {"moe.weights": RouteWeights.live},
    "uniform by_frequency": {"moe.router": "by_frequency", "moe.weights": RouteWeights.uniform},
    "uniform sized": {"moe.router": "sized", "moe.weights": RouteWeights.uniform},
    "uniform signatures": {
        "moe.router": "dense",
        "moe.weights": RouteWeights.uniform,
        "moe.shared_width": 8,
        "model.signatures": True,
    },
    "growing": {"schedule.growth": Growth.linear, "schedule.k_min": 1},
    "constant": {"optim.decay": Decay.constant},
    "one expert layer": {"moe.layers": 1},
}


def test_every_option_of_a_rule_is_tried():
    named = {name for rule in rules(Config(), (), {}) for name in rule.options}
    assert named == {*OTHER, "parallel.expert_ranks"}
    plain = to_plain(Config())
    assert all(name.split(".")[1] in plain[name.split(".")[0]] for name in named)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_is_unused_changes_nothing(case, text, tmp_path):
    """All unused options at once, in one of the runs: those of packing in the first, as they exclude others."""
    config = small(text, **case)
    idle = {name: OTHER[name] for name in unused(rules_of(config), OTHER)}
    assert len(idle) >= 4
    packing = {name: idle.pop(name) for name in ("moe.builder", "moe.pack") if name in idle}
    if config.moe.columns > config.moe.experts:  # packing takes no experts without rows
        packing = {}
    want = weights(changed(config, packing), tmp_path / "a")
    got = weights(changed(config, idle), tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


USED = {
    "moe.spread": {"moe.router": "top_p", "moe.weights": RouteWeights.uniform},
    "moe.ngram": {},
    "moe.weights": {},
    "moe.share_table": {},
    "moe.gate": {"moe.weights": RouteWeights.live},
    "moe.gate_normalised": {"moe.weights": RouteWeights.live, "moe.gate": Gate.sqrt_softplus},
    "moe.gate_scale": {"moe.weights": RouteWeights.live},
    "moe.residual": {"moe.shared_width": 8},
    "schedule.k_max": {},
    "moe.balance_loss": {"moe.router": "learned"},
    "moe.z_loss": {"moe.router": "learned"},
    "moe.consistency": {"moe.router": "stochastic"},
    "moe.plain_width": {"moe.layers": 1},
    "model.div_val": {"model.cutoffs": [99, 103]},
    "model.proj_init_std": {"model.cutoffs": [99, 103], "model.div_val": 2},
    "schedule.k_min": {"schedule.growth": Growth.linear},
    "optim.final_lr": {},
}


@pytest.mark.parametrize(("name", "case"), USED.items(), ids=USED.keys())
def test_negative_control_what_is_used_is_not_named_and_changes_the_weights(name, case, text, tmp_path):
    config = small(text, **case)
    assert name not in unused(rules_of(config), OTHER)
    want, got = (weights(c, tmp_path / str(i)) for i, c in enumerate((config, changed(config, {name: OTHER[name]}))))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(want, got, strict=False))


def test_only_what_was_given_is_named():
    config = changed(Config(), {"moe.router": "learned"})
    assert unused(rules_of(config), ["moe.spread", "optim.lr", "moe.consistency"]) == {
        "moe.spread": "moe.router=learned",
        "moe.consistency": "moe.router=learned",
    }
    assert unused(rules_of(config), ["moe.options.x", "moe.x"]) == {"moe.options.x": "moe.router=learned"}


DENSE, LEARNED = {"moe.router": "dense"}, {"moe.router": "learned"}
WHEN: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("kernels.backend", DENSE, {}),
    ("schedule.k_max", DENSE, {**DENSE, "model.signatures": True}),
    ("schedule.k_max", DENSE, {}),
    ("moe.rows", DENSE, {**DENSE, "model.signatures": True}),
    ("moe.rows", LEARNED, {}),
    ("moe.share_table", LEARNED, {"moe.router": "fresh"}),
    ("moe.share_table", LEARNED, {"moe.router": "stochastic"}),
    ("moe.share_table", DENSE, {}),
    ("moe.gate", {}, {"moe.weights": RouteWeights.live}),
    ("moe.gate", {**LEARNED, "moe.weights": RouteWeights.live}, {"moe.weights": RouteWeights.live}),
    ("moe.residual", DENSE, {}),
    ("moe.z_loss", {}, LEARNED),
    ("moe.consistency", LEARNED, {"moe.router": "stochastic"}),
    ("moe.plain_width", {}, {"moe.layers": 1}),
    ("moe.spread", {"moe.weights": RouteWeights.uniform}, {}),
    ("moe.spread", {"moe.weights": RouteWeights.sum}, {}),
    (
        "moe.spread",
        {"moe.router": "sized", "moe.weights": RouteWeights.uniform},
        {"moe.router": "top_p", "moe.weights": RouteWeights.live},
    ),
    ("model.ngram_rows", {"model.ngram": 0}, {"model.ngram": 3}),
    ("ngram_tables.optimizer", {}, {"ngram_tables.rows": 9}),
    ("ngram_tables.wire", {"ngram_tables.rows": 9, "ngram_tables.optimizer": "dense"}, {"ngram_tables.rows": 9}),
    ("model.div_val", {}, {"model.cutoffs": [9]}),
    ("model.proj_init_std", {"model.cutoffs": [9]}, {"model.cutoffs": [9], "model.div_val": 2}),
    ("schedule.k_min", {"schedule.growth": Growth.constant}, {"schedule.growth": Growth.linear}),
    ("optim.final_lr", {"optim.decay": Decay.constant}, {}),
    ("train.valid_symbols", {"train.valid_every": 0}, {"train.valid_every": 1}),
    ("parallel.wire", {"parallel.expert_ranks": 1}, {"parallel.expert_ranks": 2}),
]


@pytest.mark.parametrize(("name", "idle", "busy"), WHEN, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(WHEN)])
def test_when_an_option_is_unused(name, idle, busy, text):
    assert name in unused(rules_of(small(text, **idle)), OTHER)
    assert name not in unused(rules_of(small(text, **busy)), OTHER)
