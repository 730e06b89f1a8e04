"""A run opened for evaluation: what is in its checkpoint, and what has changed since."""

from dataclasses import replace

import pytest
import torch

from foreroute.engine.checkpoint.trained_run import open_saved
from foreroute.engine.config import Corpus, CorpusConfig, KernelsConfig, Split, Tokens
from foreroute.engine.config.enums import Backend, MatmulPrecision, Precision, SavedForBackward
from foreroute.engine.data.corpus import prepare
from foreroute.engine.errors import UserError
from foreroute.engine.model.build import RunModel, build_model
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.saved_run import save_model
from foreroute.engine.testing.tiny_run import LAYERS, tiny_config

TEXT = b"the cat sat on the mat and ate the hat\n" * 40


def a_config(folder, text=TEXT, **train):
    (folder / "text").write_bytes(text)
    where = CorpusConfig(Corpus.file, str(folder / "text"), Tokens.bytes, str(folder / "cache"))
    return replace(tiny_config(**train), corpus=replace(where, tokens=Tokens.txl))


def save(folder, config, step=3):
    """Write a checkpoint of the run as its trainer would, of an untrained model; gives the model and the tables."""
    corpus = prepare(config.corpus)
    model = build_model(config, corpus.vocab.size, weights_seed=5)
    tables = build_tables(
        config.moe, corpus.vocab.size, corpus.split(Split.train), num_tables=LAYERS, seed=1, cache_dir=None
    )
    save_model(folder, RunModel(config, corpus, model, HashedRouter.of_tables(config.moe, tables)), step)
    return model, tables


def test_model_tables_and_step_come_back(tmp_path):
    config, notes = a_config(tmp_path), []
    save(tmp_path, config)
    model, tables = save(tmp_path, config, step=8)
    kernels = KernelsConfig(backend=Backend.triton, precision=MatmulPrecision.tf32)
    found = open_saved(tmp_path, replace(config, kernels=kernels), notes.append)
    assert found.step == 8 and notes == [] and not found.model.training
    weights = found.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [torch.equal(r.table.order_rE, t.order_rE) for r, t in zip(found.routers, tables, strict=True)] == [
        True
    ] * LAYERS
    # whatever the run was trained on, it is opened on what is here
    assert found.config.kernels == KernelsConfig(
        backend=Backend.auto, mode=SavedForBackward.lean, precision=MatmulPrecision.ieee
    )


def test_weights_are_of_the_number_format_of_training(tmp_path):
    config = a_config(tmp_path, precision=Precision.bf16)
    model, _ = save(tmp_path, config)
    found = open_saved(tmp_path, config, print)
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16()), name
    assert {buffer.dtype for buffer in found.model.buffers() if buffer.is_floating_point()} <= {torch.float32}
    live = replace(config, moe=replace(config.moe, router="frozen"))
    with pytest.raises(UserError, match="does not fit this model"):
        open_saved(tmp_path, live, print)


def test_a_changed_text_is_said_and_another_vocabulary_refused(tmp_path):
    save(tmp_path, a_config(tmp_path))
    notes = []
    open_saved(tmp_path, a_config(tmp_path, TEXT[::-1]), notes.append)
    assert len(notes) == 1 and "the corpus has changed since" in notes[0]
    with pytest.raises(UserError, match="the corpus has changed and has another vocabulary"):
        open_saved(tmp_path, a_config(tmp_path, TEXT.replace(b"m", b"v")), notes.append)
    assert len(notes) == 1


def test_the_newest_whole_checkpoint_is_opened(tmp_path):
    config, notes = a_config(tmp_path), []
    with pytest.raises(UserError, match=r"run=.*: no whole checkpoint in"):
        open_saved(tmp_path, config, notes.append)
    for step in (3, 8):
        save(tmp_path, config, step)
    (tmp_path / "checkpoints/step-00000008/manifest.json").write_text("{}")
    assert open_saved(tmp_path, config, notes.append).step == 3
    assert len(notes) == 1 and "step-00000008" in notes[0]
