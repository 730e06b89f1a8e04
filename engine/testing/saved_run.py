"""An untrained run, and a checkpoint of a model as a run's trainer would write it, for tests."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from foreroute.engine.checkpoint import save_load as checkpoint
from foreroute.engine.config import (
    Config,
    Corpus,
    CorpusConfig,
    DataConfig,
    EvalConfig,
    KernelsConfig,
    ModelConfig,
    MoEConfig,
    ScheduleConfig,
    TrainConfig,
    to_plain,
)
from foreroute.engine.data.corpus import prepare
from foreroute.engine.model.build import RunModel, build_model, build_routers, router_states
from foreroute.engine.parallel.mesh import Mesh


def untrained_run(folder: Path, *, k: int, **moe: Any) -> RunModel:
    """Make a model of two layers whose experts matter, of a text with uneven bigrams, which is written to the folder.

    Args:
        moe: options of section moe.
    """
    text = folder / "text"
    text.write_bytes((97 + 9 * np.random.default_rng(0).random(9000) ** 2).astype(np.uint8).tobytes())
    section = MoEConfig(ngram=2, rows=256, **moe)
    config = Config(
        corpus=CorpusConfig(Corpus.file, str(text), cache_dir=str(folder / "cache")),
        data=DataConfig(streams=4, segment=32),
        model=ModelConfig(2, 16, heads=2, head_width=8, memory=16, dropout=0.0, init_std=0.4),
        moe=section,
        schedule=ScheduleConfig(k_min=k, k_max=k),
        train=TrainConfig(name="run", runs_dir=str(folder)),
        eval=EvalConfig(k=[1, k], streams=2),
        kernels=KernelsConfig(masked_from_k=section.experts + 1),
    )
    corpus = prepare(config.corpus)
    return RunModel(config, corpus, build_model(config, corpus.vocab.size), build_routers(config, corpus))


def save_model(folder: Path, run: RunModel, step: int = 3) -> Path:
    """Write folder/checkpoints/step-<step>; the moments of a parameter are as the parameter."""
    parameters = list(run.model.named_parameters())
    engine: Any = SimpleNamespace(
        mesh=Mesh(),
        module=run.model,
        adam_step=lambda: step,
        read_state=lambda: (
            (name, {key: value.detach().clone() for key in checkpoint.STATE_KEYS}) for name, value in parameters
        ),
    )
    state = checkpoint.TrainingState(step, step, torch.get_rng_state(), tables=router_states(run.routers))
    facts = {
        "config": to_plain(run.config),
        "corpus_sha256": run.corpus.sha256,
        "symbols": run.corpus.vocab.fingerprint,
    }
    return checkpoint.save(folder / "checkpoints", engine, state, facts=facts, keep=9)
