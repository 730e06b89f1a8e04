"""Trainer of transformers with expert layers, in one process, against plain PyTorch and against itself.

tests/examples/test_hugging_face_loops.py runs it on ranks, with DeepSpeed.
"""

import copy
import re

import pytest
import torch

from foreroute.engine.errors import UserError
from foreroute.engine.hugging_face.arguments import arguments_of
from foreroute.engine.hugging_face.expert_models import replace_experts
from foreroute.engine.hugging_face.trainer import PlannedTrainer
from foreroute.engine.plug_in import experts_of
from foreroute.engine.plug_in.call_arguments import Call
from foreroute.engine.testing.ranks import run_ranks

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState  # noqa: E402

from examples.hugging_face.tiny_llama import PAD, collate, make_model, texts  # noqa: E402

pytestmark = pytest.mark.transformers
STEPS, ROWS, ACCUMULATION, LR, CLIP, DECAY = 3, 4, 2, 0.01, 0.05, 0.1


class Theirs(transformers.Trainer):
    """A trainer that takes the texts in their order."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class InOrder(PlannedTrainer, Theirs):
    """The same with plans."""


@pytest.fixture(autouse=True)
def _fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_trainer(folder, model=None, data=None, collator=collate, kind=InOrder, **options):
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": ROWS,
            "gradient_accumulation_steps": ACCUMULATION,
            "max_grad_norm": CLIP,
            "learning_rate": LR,
            "weight_decay": DECAY,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **options,
        },
    )
    data = texts(STEPS * ACCUMULATION * ROWS) if data is None else data
    return kind(model or make_model(1), args, train_dataset=data, eval_dataset=data[:4], data_collator=collator)


def losses(trainer):
    return [line[key] for line in trainer.state.log_history for key in ("loss", "eval_loss") if key in line]


def plain_loop():
    """The same training in plain PyTorch, each batch planned in its step."""
    model = make_model(1, 0.0)
    experts = experts_of(model)
    decayed = [p for name, p in model.named_parameters() if "norm" not in name and not re.search(r"\.b\d$", name)]
    others = [p for p in model.parameters() if not any(p is one for one in decayed)]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=LR)
    data, found = texts(STEPS * ACCUMULATION * ROWS), []
    for step in range(STEPS):
        batches = [collate(data[start : start + ROWS]) for start in range(step * 8, step * 8 + 8, ROWS)]
        targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            with experts.planned(batch["input_ids"], mask=batch["attention_mask"]):
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                flat = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
                loss = torch.nn.functional.cross_entropy(*flat, ignore_index=-100, reduction="sum") / targets
                loss.backward()
            total += loss.item()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP) > CLIP
        adam.step()
        adam.zero_grad()
        found.append(total)
    return found, dict(model.named_parameters())


def test_trains_like_plain_pytorch(tmp_path):
    """Accumulation over unequal numbers of targets, clipping, decay, dynamic padding."""
    want, weights = plain_loop()
    trainer = make_trainer(tmp_path, make_model(1, 0.0))
    trainer.train()
    assert losses(trainer) == pytest.approx(want, rel=1e-5)
    start = dict(make_model(1, 0.0).named_parameters())
    for name, value in trainer.model.named_parameters():
        moved = (weights[name] - start[name]).norm()
        assert (value - weights[name]).norm() <= 1e-3 * moved, name
        assert moved > 0, name


@pytest.mark.parametrize("router", ["fresh", pytest.param("hashed", marks=pytest.mark.slow)])
def test_resumes_bit_for_bit(tmp_path, router):
    """With evaluation between, dropout in the host and the experts, and a router that draws."""
    data = texts(2 * STEPS * ACCUMULATION * ROWS)
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    model = (make_model(1, router=router) for _ in range(2))
    whole = make_trainer(tmp_path, next(model), data, **options)
    whole.train()
    again = make_trainer(tmp_path, next(model), data, **options)
    torch.manual_seed(999)  # whatever ran in between
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(whole) and len(set(losses(whole))) == 8
    both = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(mine, other) for mine, other in both)


def test_passes_outside_of_a_step_plan_by_themselves(tmp_path):
    """Evaluation, a call of the user's own, also without a mask, and generation; ids under the mask do not matter."""
    model = make_model(1, 0.0)
    trainer = make_trainer(tmp_path, model)
    batch = collate(texts(4))
    want = model.eval()(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-6)
    hidden = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)
    assert model(**{**batch, "input_ids": hidden}).loss.item() == want
    hidden[:, 0] = 7
    assert model(**{**batch, "input_ids": hidden}).loss.item() != want  # a control
    ids = batch["input_ids"][:1, :8]
    assert model(ids).logits.shape[1] == 8  # by position
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 11)


def test_planning_ahead_changes_no_loss(tmp_path):
    class Now(InOrder):
        plan_ahead = 0

    found = []
    for kind in (InOrder, Now):
        trainer = make_trainer(tmp_path)
        trainer.__class__ = kind
        asked = []
        plan = trainer.experts.planner.submit
        trainer.experts.planner.submit = lambda *a, plan=plan, asked=asked, t=trainer, **k: (
            asked.append(t.state.global_step),
            plan(*a, **k),
        )[1]
        trainer.train()
        found.append((losses(trainer), asked))
    assert found[0][0] == found[1][0]
    assert found[0][1] == [0, 0, 0, 0, 1, 1] and found[1][1] == [0, 0, 1, 1, 2, 2]


def test_an_expert_model_trains_like_itself(tmp_path):
    """Qwen3-MoE with its own live router and balance loss, in Trainer as it is and on our layers."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        pad_token_id=PAD, bos_token_id=None, eos_token_id=None, output_router_logits=True,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Qwen3MoeForCausalLM(config)
    ours = copy.deepcopy(theirs)
    replace_experts(ours)
    found = []
    for kind, model in ((Theirs, theirs), (InOrder, ours)):
        trainer = make_trainer(tmp_path, model, kind=kind)
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-5) and len(set(found[0])) == STEPS


def test_losses_and_state_of_live_routers(tmp_path):
    """The loss of a step has the mean balance loss of its micro-batches; a bias moves after each step."""
    data, found = texts(STEPS * ACCUMULATION * ROWS), []
    for weight in (0.5, 0.0):
        trainer = make_trainer(tmp_path, make_model(1, 0.0, router="learned", balance_loss=weight), data)
        trainer.train()
        found.append(losses(trainer)[0])
    model, balance = make_model(1, 0.0, router="learned", balance_loss=0.5), 0.0
    experts = experts_of(model)
    for start in (0, ROWS):
        batch = collate(data[start : start + ROWS])
        with experts.planned(batch["input_ids"], mask=batch["attention_mask"]):
            model.train()(**batch)
        balance += experts.auxiliary_loss().item() / ACCUMULATION
    assert balance > 0.1 and found[0] - found[1] == pytest.approx(balance, rel=1e-4)
    trainer = make_trainer(tmp_path, make_model(1, 0.0, router="sigmoid_bias"), data)
    trainer.train()
    biases = [value for name, value in trainer.model.named_buffers() if name.endswith(".router.bias")]
    assert biases and all(value.any() for value in biases)


def clipping_of(_, folder):
    """The norm to which DeepSpeed clips, and which groups the optimizer has."""
    found = []
    for given in ({}, {"gradient_clipping": "auto"}, {"gradient_clipping": CLIP}):
        deepspeed = {
            **given,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": 1},
        }
        trainer = make_trainer(folder, deepspeed=deepspeed, max_steps=1)
        trainer.train()
        found.append(trainer.deepspeed.gradient_clipping())
        AcceleratorState._reset_state(reset_partial_state=True)
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_max_grad_norm_is_that_of_deepspeed(tmp_path):
    assert run_ranks(clipping_of, 1, str(tmp_path)) == [[CLIP] * 3]


# Mistakes.


def without_mask(items):
    return {name: value for name, value in collate(items).items() if name != "attention_mask"}


def named_otherwise(items):
    batch = collate(items)
    return {"tokens": batch["input_ids"], "labels": batch["labels"]}


class PlansInWorker:
    """A collator that plans."""

    def __init__(self, experts):
        self.experts = experts

    def __call__(self, items):
        batch = collate(items)
        self.experts.plan(batch["input_ids"])
        return batch


def test_mistakes_end_in_one_line(tmp_path):
    model = make_model(1)
    cases = [
        ({"collator": without_mask}, "a batch has no attention_mask, but 2 of its 4 sequences of input_ids"),
        ({"collator": named_otherwise}, "a batch has labels, tokens, without input_ids: the collator must return it"),
        (
            {"collator": PlansInWorker(experts_of(model)), "dataloader_num_workers": 1},
            "planning in a forked process, such as a DataLoader's worker: must be in the training process",
        ),
    ]
    for options, said in cases:
        data = [{"input_ids": [5] * (3 + i % 2)} for i in range(8)]
        with pytest.raises(UserError) as caught:
            make_trainer(tmp_path, model, data, **options).train()
        assert str(caught.value).startswith(said)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="0 calls of replace_feed_forwards: must be 1"):
        make_trainer(tmp_path, torch.nn.Linear(2, 2))
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(UserError, match="model_init: a model with expert layers must be given as model"):
        InOrder(args=args, model_init=lambda: model)


def test_padding_is_known_only_where_its_id_has_no_other_meaning():
    model = make_model(1)
    ids = torch.tensor([[PAD, 1, 2], [3, 4, 5]])
    with pytest.raises(UserError, match="1 of its 2 sequences"):
        arguments_of(model).read(Call(model, (), {"input_ids": ids}), 1)
    model.config.eos_token_id = [4, PAD]
    assert arguments_of(model).read(Call(model, (), {"input_ids": ids}), 1).mask is None
