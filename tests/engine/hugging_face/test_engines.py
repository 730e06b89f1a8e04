"""DeepSpeed engines around sharded experts on two ranks: the gradient norm at ZeRO-0, against plain PyTorch, and
checkpoints."""

import tempfile
from pathlib import Path

import deepspeed
import numpy as np
import pytest
import torch
from torch import distributed as dist

from foreroute.engine.hugging_face.engines import adapt_engine
from foreroute.engine.plug_in import parameter_groups
from foreroute.engine.testing.ranks import run_ranks
from tests.engine.plug_in.test_plug_in_on_ranks import ADAM, EXPERTS, ROWS, batch, by_expert, make

CLIP, STEPS = 0.1, 2


def start(stage, *, adapted=True, bf16=False):
    model, experts = make(expert_ranks=2)
    config = {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": CLIP,
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }
    adam = torch.optim.Adam(parameter_groups(model.parameters()), **ADAM)
    engine = deepspeed.initialize(model=model, optimizer=adam, config=config)[0]
    if adapted:
        adapt_engine(engine, experts)
    return engine, experts


def train(rank, engine, experts, first=0):
    for step in range(first, first + STEPS):
        _, ids, targets = (part.chunk(2)[rank] for part in batch(step))
        with experts.planned(ids):
            engine.backward(engine(ids, targets))
        engine.step()
    return by_expert(dict(engine.module.named_parameters()), range(rank * EXPERTS // 2, (rank + 1) * EXPERTS // 2))


def message(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def work(rank, folder):
    deepspeed.utils.logging.logger.setLevel("ERROR")
    clipped = [train(rank, *start(0, adapted=adapted)) for adapted in (True, False)]
    engine, experts = start(1)
    train(rank, engine, experts)
    engine.save_checkpoint(folder)
    said = [message(engine.save_checkpoint, folder, "other", client_state={"a": 1})]
    dist.barrier()
    want = train(rank, engine, experts, STEPS)
    engine, experts = start(2)  # another stage
    found, state = engine.load_checkpoint(folder)
    assert Path(found) == Path(folder) / "global_step2" and state == {} and engine.global_steps == STEPS
    got = train(rank, engine, experts, STEPS)
    said += [message(engine.load_checkpoint, f"{folder}/global_step2"), message(start, 0, bf16=True)]
    return clipped, want, got, said


@pytest.mark.dist
def test_norms_and_checkpoints():
    model, experts = make()
    adam = torch.optim.Adam(model.parameters(), **ADAM)
    for step in range(STEPS):
        _, ids, targets = batch(step)
        with experts.planned(ids):
            model(ids, targets).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP) > 2 * CLIP
        adam.step()
        adam.zero_grad()
    truth = by_expert(dict(model.named_parameters()), range(EXPERTS))
    start = by_expert(dict(make()[0].named_parameters()), range(EXPERTS))
    with tempfile.TemporaryDirectory() as folder:
        answers = run_ranks(work, 2, folder)
    for (clipped, theirs), want, got, said in answers:
        assert error(clipped, truth, start) < 1e-5
        assert error(theirs, truth, start) > 1e-3  # a control: DeepSpeed's own norm
        assert got.keys() == want.keys()
        assert all(np.allclose(value, want[name], rtol=1e-6, atol=1e-7) for name, value in got.items())
        refused, missing, halves = said
        assert refused == (
            "UserError: save_checkpoint with client_state: must be saved apart from a model with expert layers"
        )
        assert missing.startswith("UserError: ") and missing.endswith("holds no checkpoint")
        assert halves.startswith("UserError: bf16 or fp16 with sharded experts: needs zero_optimization.stage 1, 2 or")


def error(found, truth, start):
    """The largest error of a parameter's change, relative to the largest change."""
    changes = max(np.abs(truth[name] - start[name]).max() for name in truth)
    return max(np.abs(found[name] - truth[name]).max() for name in found) / changes
