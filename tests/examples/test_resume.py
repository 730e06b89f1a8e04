"""Runs with routers of the examples that stop and resume: bit for bit as if they had never stopped."""

import pytest
import torch

from tests.engine.train.test_trainer import losses, make_config, make_trainer, parameters, stop_at, text, train

assert text  # a fixture
ROUTERS = {
    "my_router:MyRouter": {},
    "rmoe:RecurrentRouter": {"hidden": 8},
    "comet:TreeRouter": {"trees": 4},
    "evomoe:DenseToSparseRouter": {"steps": 8, "threshold": 0.1},
    "dynmoe:TopAnyRouter": {"start": 1, "interval": 3},
    "union_of_experts:SliceRouter": {},
    "read_me:NetworkRouter": {"width": 6},
}


@pytest.mark.parametrize("name", ROUTERS)
def test_resume_is_bit_identical_to_never_stopping(tmp_path, text, name):
    moe = {"router": f"examples.routers.{name}", "options": ROUTERS[name]}
    config = make_config(text, moe=moe, train={"steps": 10})
    whole = make_trainer(config, tmp_path / "whole")  # draws from PyTorch's generator from here on
    assert train(whole)
    first = make_trainer(config, tmp_path / "parts")
    assert not train(first, stop_at(first, 5))
    torch.manual_seed(999)  # whatever ran in between
    second = make_trainer(config, tmp_path / "parts")
    second.resume()
    assert second.step == 5 and train(second)
    for found in (parameters, buffers):
        want, got = found(whole), found(second)
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    assert losses(tmp_path / "whole")[-2:] == losses(tmp_path / "parts")[-2:]


def buffers(trainer):
    return dict(trainer.model.named_buffers())
