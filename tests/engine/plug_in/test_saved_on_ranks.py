"""A user's model saved on some ranks at one ZeRO stage goes on on others as one process that never stopped."""

import re
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import safe_open
from torch import distributed as dist
from torch import nn

from foreroute.engine.config import ParallelConfig
from foreroute.engine.errors import UserError
from foreroute.engine.optim.model_state import state_of
from foreroute.engine.plug_in import experts_of, load_pretrained, parameter_groups, save_pretrained
from foreroute.engine.testing.ranks import run_ranks
from tests.engine.plug_in import test_saved as case
from tests.examples.programs import run_program

ROOT = Path(__file__).resolve().parents[3]
PER_LINK = 2  # steps of each topology


def make(seed=0, **options):
    """The model without the dropout of PyTorch, whose random numbers depend on the ranks."""
    model = case.make(seed, **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class Training(case.Training):
    """One rank of a training with DeepSpeed."""

    def __init__(self, stage, expert_ranks, seed, bf16=False):
        model = make(seed, parallel=ParallelConfig(expert_ranks=expert_ranks))
        config = {
            "train_micro_batch_size_per_gpu": case.ROWS // dist.get_world_size(),
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.0,
            "bf16": {"enabled": bf16},
            "steps_per_print": 10**9,
        }
        adam = torch.optim.Adam(parameter_groups(p for p in model.parameters() if p.requires_grad), **case.ADAM)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(adam, [2, 4], gamma=0.5)
        self.stage, self.expert_ranks = stage, expert_ranks
        self.model = deepspeed.initialize(model=model, optimizer=adam, lr_scheduler=scheduler, config=config)[0]

    def steps(self, first, last):
        rank, ranks, losses = dist.get_rank(), dist.get_world_size(), []
        for step in range(first, last):
            ids, targets = (part.chunk(ranks)[rank] for part in case.batch(step))
            with experts_of(self.model).planned(ids):
                loss = self.model(ids, targets)
                self.model.backward(loss)
            self.model.step()
            total = loss.detach().float().clone()
            dist.all_reduce(total)
            losses.append(total.item() / ranks)
        return losses

    def save(self, folder):
        return save_pretrained(self.model, folder)

    def load(self, folder):
        load_pretrained(self.model, folder)

    def weights(self):
        read = safe_get_full_fp32_param if self.stage else nn.Parameter.detach
        trained = {name: p for name, p in self.model.module.named_parameters() if p.requires_grad}
        return by_expert({name: read(p) for name, p in trained.items()}, experts_of(self.model).mesh)


def by_expert(weights, mesh):
    found = {}
    for name, value in weights.items():
        experts = mesh.local_experts(case.EXPERTS) if ".moe.experts." in name else [""]
        parts = value if ".moe.experts." in name else [value]
        found |= {f"{name}@{e}": part.detach().numpy().copy() for e, part in zip(experts, parts, strict=True)}
    return found


def go_on(rank, number, stage, expert_ranks, folder, options):
    """One link of a chain: load what the link before has saved, save it again at once, make steps, save."""
    deepspeed.utils.logging.logger.setLevel("ERROR")
    training = Training(stage, expert_ranks, seed=number, bf16=options.get("bf16", False))
    return link(training, number, folder, options)


def link(training, number, folder, options):
    if number:
        training.load(folder / str(number - 1))
        training.save(folder / f"{number - 1} again")
    if options.get("forget"):
        state = state_of(training.model, None, experts_of(training.model).mesh)
        for name, values in list(state.read_state()):
            state.write_state(name, {key: value for key, value in values.items() if key != options["forget"]})
    first = number * PER_LINK
    losses = training.steps(first, first + PER_LINK)
    training.save(folder / str(number))
    return SimpleNamespace(losses=losses, weights=training.weights())


def run_chain(chain, folder):
    """Run the links (ranks, ZeRO stage or None for plain PyTorch, expert ranks, options); return losses and weights."""
    losses = []
    for number, (ranks, stage, expert_ranks, options) in enumerate(chain):
        if stage is None:
            training = case.Training(seed=number, maker=make)
            answers = [link(training, number, folder, options)]
            answers[0].weights = by_expert(answers[0].weights, experts_of(training.model).mesh)
        else:
            answers = run_ranks(go_on, ranks, number, stage, expert_ranks, folder, options)
        losses += answers[0].losses
        weights = {name: value for answer in answers for name, value in answer.weights.items()}
    return losses, weights


@pytest.fixture(scope="module")
def truth():
    """Losses and weights of one process that never stops, by number of links."""
    training, found = case.Training(maker=make), []
    for number in range(6):
        losses = training.steps(number * PER_LINK, (number + 1) * PER_LINK)
        trained = {name: p for name, p in training.model.named_parameters() if p.requires_grad}
        found.append((losses, by_expert(trained, experts_of(training.model).mesh)))
    return found


def compare(chain, got, truth):
    losses, weights = got
    assert losses == pytest.approx([loss for some, _ in truth[: len(chain)] for loss in some], rel=1e-6)
    want = truth[len(chain) - 1][1]
    largest = max(np.linalg.norm(value) for value in want.values())
    for name, value in want.items():
        difference = np.linalg.norm(weights[name] - value)
        assert difference < 1e-6 * np.linalg.norm(value) + 1e-7 * largest, name


def stored(path):
    """All tensors of a folder, but random states, by key."""
    found = {}
    for file in path.glob("foreroute-*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= {key: shard.get_tensor(key) for key in shard.keys() if not key.startswith("rng/")}  # noqa: SIM118
    return found


def check_saved_again(chain, folder):
    for number in range(len(chain) - 1):
        assert case.same(stored(folder / f"{number} again"), stored(folder / str(number))), number


SHORT = [(2, 3, 2, {}), (1, None, 1, {}), (3, 1, 3, {})]


@pytest.mark.dist
def test_two_ranks_one_rank_three_ranks(truth, tmp_path):
    got = run_chain(SHORT, tmp_path)
    compare(SHORT, got, truth)
    check_saved_again(SHORT, tmp_path)
    shards = [f"foreroute-{rank:05d}.safetensors" for rank in range(3)]
    found = sorted(file.name for file in (tmp_path / "2").iterdir())
    assert found == [*shards, "foreroute.json", "model.safetensors"]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    "chain",
    [
        [(4, 3, 2, {}), (2, 0, 2, {}), (3, 3, 1, {}), (1, 2, 1, {}), (4, 2, 2, {}), (1, 0, 1, {})],
        [(3, 3, 3, {}), (2, 2, 2, {}), (1, 3, 1, {}), (2, 1, 1, {}), (4, 0, 2, {}), (1, None, 1, {})],
    ],
)
def test_every_stage_takes_the_state_of_every_other(chain, truth, tmp_path):
    compare(chain, run_chain(chain, tmp_path), truth)
    check_saved_again(chain, tmp_path)


@pytest.mark.dist
@pytest.mark.slow
def test_bf16_keeps_the_fp32_weights(tmp_path):
    half = {"bf16": True}
    chain = [(2, 1, 2, half), (2, 3, 1, half), (1, 2, 1, half), (3, 1, 3, half)]
    run_chain(chain, tmp_path)
    check_saved_again(chain, tmp_path)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("what", ["exp_avg", "exp_avg_sq"])
def test_forgotten_moments_are_noticed(what, truth, tmp_path):
    """Negative control."""
    chain = [*SHORT[:2], (3, 1, 3, {"forget": what})]
    with pytest.raises(AssertionError):
        compare(chain, run_chain(chain, tmp_path), truth)


# DeepSpeed's own checkpoints, and mistakes.


def message(function):
    try:
        function()
    except UserError as error:
        return str(error)
    return "nothing"


def deepspeeds_own(rank, folder):
    """What save_checkpoint says of sharded experts, whether training goes on; and losses with whole experts."""
    deepspeed.utils.logging.logger.setLevel("ERROR")
    sharded = Training(3, 2, seed=0)
    sharded.steps(0, 1)
    said = [message(lambda: sharded.model.save_checkpoint(folder / "sharded"))]
    sharded.steps(1, 2)
    said.append(message(lambda: save_pretrained(sharded.model, folder / f"rank {rank}")))
    sharded.save(folder / "saved")
    whole = Training(1, 1, seed=0)
    whole.steps(0, 2)
    whole.model.save_checkpoint(folder / "whole", client_state={"experts": experts_of(whole.model).state_dict()})
    want = whole.steps(2, 4)
    again = Training(1, 1, seed=0)
    _, state = again.model.load_checkpoint(folder / "whole")
    experts_of(again.model).load_state_dict(state["experts"])
    if rank == 0:
        (folder / "saved/foreroute-00001.safetensors").unlink()
    dist.barrier()
    said.append(message(lambda: load_pretrained(sharded.model, folder / "saved")))
    losses = again.steps(2, 4)
    said.append(message(lambda: Training(0, 1, seed=0, bf16=True).save(folder / "half")))
    said.append(message(lambda: save_pretrained(again.model, folder / "own", optimizer=object())))
    again.model.gradient_accumulation_steps = lambda: 4  # of the next step two have run
    again.model.micro_steps = 6
    said.append(message(lambda: again.save(folder / "early")))
    return said, want, losses


@pytest.mark.dist
@pytest.mark.slow
def test_deepspeeds_checkpoints_take_whole_experts_and_refuse_sharded_ones(tmp_path):
    for (saving, folders, missing, half, own, early), want, got in run_ranks(deepspeeds_own, 2, tmp_path):
        assert "\n" not in saving
        assert "call foreroute.engine.plug_in.save_pretrained(engine, folder) and load_pretrained" in saving
        assert got == want
        assert folders.startswith("the ranks save to different folders: ") and "rank 0, " in folders
        assert missing == f"{tmp_path}/saved/foreroute-00001.safetensors: missing"
        assert half.endswith(" at ZeRO-0 cannot be read: fp16 and bf16 need ZeRO 1, 2 or 3")
        assert own == "optimizer: must be left out, as a DeepSpeed engine has its own"
        assert early == "2 of 4 micro-batches have run after step 1: must be between optimizer steps"


@pytest.mark.dist
@pytest.mark.slow
def test_the_example_prints_what_the_page_shows(tmp_path):
    """Two ranks, one and three, and one rank three times."""
    page = (ROOT / "docs/plug_in.md").read_text()
    shown = re.findall(r"^    (step \d+ loss \d\.\d{4})$", page, re.MULTILINE)
    for chain in ([(2, 3), (1, 1), (3, 2)], [(1, 1)] * 3):
        lines = [_example(ranks, tmp_path / str(len(set(chain))), stage) for ranks, stage in chain]
        assert [line.split()[:2] for line in lines] == [["step", "20"], ["step", "40"], ["step", "60"]]
        for line, want in zip(lines, shown, strict=True):
            assert float(line.split()[-1]) == pytest.approx(float(want.split()[-1]), rel=1e-3)


def _example(ranks, folder, stage):
    printed = run_program("tests/examples/save_and_load.py", ranks, folder, stage)
    return next(line for line in printed.splitlines() if line.startswith("step"))
