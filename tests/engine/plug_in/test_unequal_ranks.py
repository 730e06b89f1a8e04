"""Ranks of an expert group with unequal numbers of tokens, and planned methods on two ranks, against plain PyTorch.

The truth is one rank without DeepSpeed, whose batch is padded to the longest sequence; its loss is the mean over all
tokens that have a target. As in tests/engine/plug_in/test_plug_in_on_ranks.py the optimizer is linear in the gradient.
"""

from types import SimpleNamespace

import deepspeed
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param
from torch import distributed as dist
from torch import nn

from foreroute.engine.config import Builder, ExchangeKind, MoEConfig, ParallelConfig
from foreroute.engine.plug_in import mean_over_ranks, parameter_groups, replace_feed_forwards
from foreroute.engine.testing.ranks import run_ranks

SYMBOLS, WIDTH, EXPERTS, LAYERS, ROWS, LENGTH, K, STEPS = 11, 16, 4, 2, 8, 9, 2, 2
ADAM = {"lr": 500.0, "betas": (0.0, 0.999), "eps": 1e3}  # the update is 0.5 times the gradient
NO_TARGET = -100
METHODS = {
    "hashed": {"builder": Builder.random},
    "fresh": {"router": "fresh"},
    "shuffled": {"builder": Builder.random, "keys": "shuffled"},
    "top_p": {"router": "top_p", "constant_experts": 1, "copy_experts": 1, "shared_width": 6, "weights": "live"},
    "long": {"builder": Builder.random, "ngram": 4},
    "given": {"router": "given", "weights": "live", "gate": "softmax"},
}
UNEQUAL = [3, 5], [9, 6]  # sequences and length of the ranks
OF_FOUR = [1, 3, 2, 2], [9, 4, 6, 7]
PARTS = [ROWS, ROWS], [7, 2]  # each rank has a part of each sequence
CASES = [
    {"method": "hashed", "sizes": UNEQUAL},
    {"method": "fresh"},
    {"method": "given", "sizes": UNEQUAL, "how": "attached"},
    {"method": "top_p", "sizes": UNEQUAL, "stage": 3, "chunks": 3},
    {"method": "long", "sizes": PARTS},
]
MORE_CASES = [
    {"method": "shuffled", "stage": 3},
    {"method": "given"},
    {"method": "top_p", "stage": 3, "chunks": 2},
    {"method": "top_p", "sizes": UNEQUAL, "exchange": ExchangeKind.gather},
    {"method": "hashed", "sizes": ([8, 0], [9, 9])},
    {"method": "long", "sizes": PARTS, "how": "attached"},
]
CASES_OF_FOUR = [{"method": "given", "sizes": OF_FOUR}, {"method": "hashed", "sizes": OF_FOUR, "stage": 3}]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 40), nn.ReLU(), nn.Linear(40, WIDTH))

    def forward(self, x):
        x = x + self.mix(x.cumsum(1) / LENGTH)
        return x + self.mlp(x)


class Theirs(nn.Module):
    """Returns the sum of the losses of all ids that have a target; `mixes` ids of a sequence."""

    mixes = True

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, ids, targets, mask=None, routes=None):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x) if self.mixes else x + layer.mlp(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=NO_TARGET)


def make(method, **parallel):
    torch.manual_seed(0)
    model = Theirs()
    text = torch.randint(0, SYMBOLS, (300,), generator=torch.Generator().manual_seed(9))
    rows = {"experts": EXPERTS, "expert_width": 12, "ngram": 2, "rows": 64}
    moe = MoEConfig(**rows | METHODS[method])
    experts = replace_feed_forwards(
        model,
        r"layers\.\d+\.mlp",
        width=WIDTH,
        vocab_size=SYMBOLS,
        moe=moe,
        k=K,
        init_std=0.3,
        text_ids=None if method == "given" else text,
        parallel=ParallelConfig(**parallel),
    )
    return model, experts


def batch(step, sizes, method):
    """Ids, targets, mask and routes of all ranks, padded; what a rank has not is padding."""
    draw = np.random.default_rng(step)
    ids, targets = (torch.from_numpy(draw.integers(0, SYMBOLS, (ROWS, LENGTH))) for _ in range(2))
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    mask[1, 5:] = 0
    if sizes == PARTS:
        mask[2, :8] = 0
    elif sizes:
        for rank, length in enumerate(sizes[1]):
            mask[sum(sizes[0][:rank]) :, length:] = 0
            mask[sum(sizes[0][: rank + 1]) :] = 1
        mask[1, 5:] = 0
    has_target = torch.from_numpy(draw.random((ROWS, LENGTH)) < np.linspace(0.2, 0.9, ROWS)[:, None])
    targets[(mask == 0) | ~has_target] = NO_TARGET
    found = {"ids": ids, "targets": targets, "mask": mask}
    if method == "given":
        experts = draw.permuted(np.tile(np.arange(EXPERTS), (ROWS, LENGTH, LAYERS, 1)), axis=-1)
        found["routes"] = torch.from_numpy(experts[..., :K])
    return found


def part(found, rank, sizes):
    """What a rank has of a batch."""
    if sizes == PARTS:
        place = slice(0, 7) if rank == 0 else slice(7, None)
        return {name: value[:, place] for name, value in found.items()}
    rows, lengths = sizes or ([ROWS // 2] * 2, [LENGTH] * 2)
    first = sum(rows[:rank])
    return {name: value[first : first + rows[rank], : lengths[rank]] for name, value in found.items()}


def run(call, experts, given, how):
    context = {name: given[name] for name in ("mask", "routes") if name in given}
    if how == "attached":
        return call(given["ids"], given["targets"], **context)
    with experts.planned(given["ids"], **context):
        return call(given["ids"], given["targets"])


def by_expert(parameters, experts):
    found = {}
    for name, value in parameters.items():
        parts = zip(experts, value, strict=True) if ".experts." in name else [("", value)]
        found |= {f"{name}@{expert}": one.detach().numpy().copy() for expert, one in parts}
    return found


def one_rank(case):
    model, experts = make(case["method"])
    model.mixes = case.get("sizes") != PARTS
    adam = torch.optim.Adam(model.parameters(), **ADAM)
    losses = []
    for step in range(STEPS):
        given = batch(step, case.get("sizes"), case["method"])
        loss = run(model, experts, given, "planned") / (given["targets"] != NO_TARGET).sum()
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return SimpleNamespace(losses=losses, weights=by_expert(dict(model.named_parameters()), range(EXPERTS)))


def train(rank, case, mean=mean_over_ranks):
    stage, how, sizes = case.get("stage", 1), case.get("how", "planned"), case.get("sizes")
    parallel = {name: case[name] for name in ("chunks", "exchange") if name in case}
    model, experts = make(case["method"], expert_ranks=2, **parallel)
    model.mixes = sizes != PARTS
    if sizes == PARTS:
        experts.shard_sequences(dist.new_group([0, 1], backend="gloo"))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    adam = torch.optim.Adam(parameter_groups(model.parameters()), **ADAM)
    engine = deepspeed.initialize(model=model, optimizer=adam, config=config)[0]
    if how == "attached":
        experts.attach(engine, mask="mask", **({"routes": "routes"} if case["method"] == "given" else {}))
    losses = []
    for step in range(STEPS):
        given = part(batch(step, sizes, case["method"]), rank, sizes)
        loss = mean(run(engine, experts, given, how), (given["targets"] != NO_TARGET).sum())
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    weights = {name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
    first = rank % 2 * EXPERTS // 2
    return SimpleNamespace(losses=losses, weights=by_expert(weights, range(first, first + EXPERTS // 2)))


def own_mean(loss_sum, count):
    """Each rank's own mean: a token of a rank with fewer counts more."""
    return loss_sum / count


def work(rank, cases, wrong):
    deepspeed.utils.logging.logger.setLevel("ERROR")
    return [train(rank, case) for case in cases], [train(rank, case, own_mean) for case in wrong]


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_ranks(work, 2, CASES, CASES[:1])


def faults(got, want):
    found = [] if got.losses == pytest.approx(want.losses, rel=1e-6) else [f"losses {got.losses}, {want.losses}"]
    largest = max(np.linalg.norm(value) for value in want.weights.values())
    for name, value in got.weights.items():
        difference = np.linalg.norm(value - want.weights[name])
        if not difference < 1e-6 * np.linalg.norm(want.weights[name]) + 1e-7 * largest:
            found.append(f"{name} is off by {difference}")
    return found


def check(answers, cases):
    for number, case in enumerate(cases):
        want = one_rank(case)
        assert [faults(answer[number], want) for answer, _ in answers] == [[]] * len(answers), case
        assert {name for answer, _ in answers for name in answer[number].weights} == set(want.weights)


@pytest.mark.dist
def test_two_ranks_train_like_plain_pytorch(on_two_ranks):
    check(on_two_ranks, CASES)


@pytest.mark.dist
@pytest.mark.slow
def test_more_cases_on_two_ranks():
    check(run_ranks(work, 2, MORE_CASES, []), MORE_CASES)


@pytest.mark.dist
@pytest.mark.slow
def test_four_ranks_in_two_groups():
    check(run_ranks(work, 4, CASES_OF_FOUR, []), CASES_OF_FOUR)


@pytest.mark.dist
def test_a_mean_of_each_rank_is_another_loss(on_two_ranks):
    """Negative control, also of the bound on weights."""
    want = one_rank(CASES[0])
    for _, (other,) in on_two_ranks:
        assert "losses" in faults(other, want)[0] and len(faults(other, want)) > 9


def test_the_mean_on_one_rank():
    loss = mean_over_ranks(torch.tensor(6.0, requires_grad=True), 4)
    assert loss.item() == 1.5
    assert mean_over_ranks(torch.tensor(0.0), torch.tensor(0)).item() == 0.0
