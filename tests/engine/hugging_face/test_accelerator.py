"""Accelerate with expert layers, in one process without DeepSpeed; test_hugging_face_loops.py runs it on ranks."""

import pytest
import torch

from foreroute.engine.errors import UserError
from foreroute.engine.hugging_face.accelerator import PlannedBatches, planned_batches, separate_experts, use_experts
from foreroute.engine.plug_in import experts_of

pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState  # noqa: E402

from examples.hugging_face.tiny_llama import collate, make_model, texts  # noqa: E402

pytestmark = pytest.mark.transformers
ACCUMULATION = 2


@pytest.fixture(autouse=True)
def _fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def start():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    model = make_model(1)
    use_experts(accelerator, experts_of(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(texts(10), 4, collate_fn=collate, generator=torch.Generator())
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def step(accelerator, model, optimizer, batch):
    """Accelerate's own step; whether it updated the weights, and how many texts a gather for metrics has."""
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), accelerator.sync_gradients, len(accelerator.gather_for_metrics(batch["input_ids"]))


def planned_epoch(accelerator, model, optimizer, loader, depth=2):
    experts, found = experts_of(model), []
    for plans, batch in planned_batches(accelerator, experts, loader, model=model, depth=depth):
        with accelerator.accumulate(model), experts.planned(plans):
            found.append(step(accelerator, model, optimizer, batch))
    return found


@pytest.mark.parametrize("depth", [1, 5])
def test_an_epoch_is_that_of_accelerate(depth):
    """Three batches in steps of two: the last one is short and updates, though planning has asked for it before."""
    accelerator, model, optimizer, loader = start()
    experts, want = experts_of(model), []
    for batch in loader:
        plans = experts.plan(batch["input_ids"], mask=batch["attention_mask"])
        with accelerator.accumulate(model), experts.planned(plans):
            want.append(step(accelerator, model, optimizer, batch))
    AcceleratorState._reset_state(reset_partial_state=True)
    got = planned_epoch(*start(), depth=depth)
    assert got == want
    assert [updated for _, updated, _ in got] == [False, True, True] and got[-1][2] == 2


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    accelerator, *parts = start()
    planned_epoch(accelerator, *parts)
    accelerator.save_state(str(tmp_path))
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "foreroute" / "foreroute.json").exists()
    want = planned_epoch(accelerator, *parts)
    accelerator.free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, *parts = start()
    before = planned_epoch(accelerator, *parts)
    accelerator.load_state(str(tmp_path))
    assert planned_epoch(accelerator, *parts) == want != before


def test_batches_end_and_refusals():
    accelerator, model, _, loader = start()
    experts = experts_of(model)
    assert list(planned_batches(accelerator, experts, [], model=model)) == []
    with pytest.raises(UserError, match="depth=0: must be 1 batch or more"):
        PlannedBatches(loader, experts, model, 0)
    with pytest.raises(UserError, match="a batch is a list: must be a mapping with input_ids"):
        next(planned_batches(accelerator, experts, [[1]], model=model))
    sharded = torch.nn.Parameter(torch.zeros(2))
    sharded.allreduce, sharded.group_name = False, "ep_size_2"
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3)), sharded])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with pytest.raises(UserError, match="already has a scheduler: build it from parameter_groups"):
        separate_experts(optimizer)
    for group in optimizer.param_groups:
        del group["initial_lr"]
    separate_experts(optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    assert optimizer.param_groups[1]["moe"] and optimizer.param_groups[1]["params"] == [sharded]
    separate_experts(optimizer)
    assert len(optimizer.param_groups) == 2 and scheduler is not None
