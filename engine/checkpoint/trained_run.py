"""A trained run, opened for evaluation or sampling: model and tables from its newest whole checkpoint, no DeepSpeed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from foreroute.engine.checkpoint import save_load as checkpoint
from foreroute.engine.config import Backend, Config, MatmulPrecision, Precision, SavedForBackward
from foreroute.engine.data.corpus import prepare
from foreroute.engine.data.tokens.build import same_vocab
from foreroute.engine.errors import UserError, require
from foreroute.engine.model.build import RunModel, build_model, restore_routers
from foreroute.engine.moe.int8_weights import Int8


@dataclass(frozen=True, slots=True)
class SavedRun(RunModel):
    """A run's model as its newest checkpoint has it."""

    step: int


def open_saved(
    folder: Path, config: Config, note: Callable[[str], None], device: torch.device | str = "cpu"
) -> SavedRun:
    """Load the newest whole checkpoint of a run folder, its model to a device.

    Raises:
        UserError: there is none, or it does not fit the model (a corpus with another vocabulary).
    """
    path, warnings = checkpoint.find_newest(folder / "checkpoints")
    for warning in warnings:
        note(warning)
    if path is None:
        raise UserError(f"run={folder}: no whole checkpoint in {folder / 'checkpoints'}")
    corpus = prepare(config.corpus)
    manifest = checkpoint.read_manifest(path)
    require(
        same_vocab(manifest["symbols"], corpus.vocab),
        f"run={folder}: the corpus has changed and has another vocabulary than the one trained on",
    )
    if manifest["corpus_sha256"] != corpus.sha256:
        note(f"the corpus has changed since {path} was trained: its held-out text is another one")
    # by the device of today, whatever the run was trained on
    today = replace(config.kernels, backend=Backend.auto, mode=SavedForBackward.lean, precision=MatmulPrecision.ieee)
    config = replace(config, kernels=today)
    model = build_model(config, corpus.vocab.size)
    state = checkpoint.load_weights(path, model)
    if config.train.precision is Precision.bf16:  # as in training: buffers keep fp32
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        for module in model.modules():
            if isinstance(module, Int8):
                module.dtype = torch.bfloat16
    routers = restore_routers(config, state.tables, corpus.vocab.size, corpus=corpus)
    return SavedRun(config, corpus, model.eval().to(device), routers, state.step)
