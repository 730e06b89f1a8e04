"""Somebody else's model with our expert layers, trained by their DeepSpeed loop on 2 and 4 gloo ranks, against plain
PyTorch.

As in tests/engine/train/test_many_ranks.py the optimizer is linear in the gradient, which shows every gradient with its
scale.
"""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from foreroute.engine.config import Builder, MoEConfig, ParallelConfig
from foreroute.engine.config.enums import ExchangeKind
from foreroute.engine.nested import tensors_in
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.plug_in import experts_of, parameter_groups, replace_feed_forwards
from foreroute.engine.testing.ranks import run_ranks
from tests.examples.programs import run_program

ROOT = Path(__file__).resolve().parents[3]
SYMBOLS, WIDTH, EXPERTS, ROWS, LENGTH = 11, 16, 4, 8, 9
KS = 2, 3, 1  # of the three steps
ADAM = {"lr": 500.0, "betas": (0.0, 0.999), "eps": 1e3}  # the update is 0.5 times the gradient


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 40), nn.ReLU(), nn.Linear(40, WIDTH))

    def forward(self, x):
        x = x + self.mix(x.cumsum(1) / LENGTH)
        return x + self.mlp(x)


class Theirs(nn.Module):
    recompute = False

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, ids, targets):
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


GATE = {"weights": "live", "gate": "sigmoid", "gate_normalised": False, "copy_experts": 1}


def make(dropout=0.0, seed=0, gate=False, **parallel):
    torch.manual_seed(seed)
    model = Theirs()
    options = GATE if gate else {}
    moe = MoEConfig(experts=EXPERTS, expert_width=12, ngram=2, rows=64, builder=Builder.random, **options)
    experts = replace_feed_forwards(
        model,
        r"layers\.\d+\.mlp",
        width=WIDTH,
        vocab_size=SYMBOLS,
        moe=moe,
        k=KS[0],
        dropout=dropout,
        init_std=0.3,
        seed=seed,
        parallel=ParallelConfig(**parallel),
    )
    return model, experts


def batch(step):
    """Ids left of each sequence, ids and targets of all ranks: the same everywhere."""
    drawn = torch.randint(0, SYMBOLS, (ROWS, LENGTH + 2), generator=torch.Generator().manual_seed(step))
    return drawn[:, :1], drawn[:, 1:-1], drawn[:, 2:]


def one_rank(dropout=0.0, left=False, gate=False):
    """Plain PyTorch, no DeepSpeed: losses, and the weights after three steps, of experts each by itself."""
    model, experts = make(dropout, gate=gate)
    adam = torch.optim.Adam(model.parameters(), **ADAM)
    losses = []
    for step, k in enumerate(KS):
        context, ids, targets = batch(step)
        experts.k = k
        with experts.planned(ids, context if left else None):
            loss = model(ids, targets)
            loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return SimpleNamespace(losses=losses, weights=by_expert(dict(model.named_parameters()), range(EXPERTS)))


def by_expert(parameters, experts):
    found = {}
    for name, value in parameters.items():
        parts = zip(experts, value, strict=True) if ".experts." in name else [("", value)]
        found |= {f"{name}@{expert}": part.detach().numpy().copy() for expert, part in parts}
    return found


def initialize(model, stage, accumulation=1, optimizer="client", bf16=False):
    config = {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size() // accumulation,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,  # 1.0 by default
        "bf16": {"enabled": bf16},
        "steps_per_print": 10**9,
    }
    adam = None
    if optimizer == "client":
        adam = torch.optim.Adam(parameter_groups(model.parameters()), **ADAM)
    else:
        config["optimizer"] = {"type": "Adam", "params": {**ADAM, "torch_adam": True, "weight_decay": 0.0}}
    return deepspeed.initialize(model=model, optimizer=adam, config=config)[0]


def train(rank, case):
    """Three steps of one case on this rank; says what `one_rank` says."""
    stage, options = case["stage"], case.get("options", {})
    model, experts = make(case.get("dropout", 0.0), gate=case.get("gate", False), **options)
    model.recompute = case.get("recompute", False)
    accumulation, how = case.get("accumulation", 1), case.get("how", "with")
    engine = initialize(model, stage, accumulation, case.get("optimizer", "client"))
    if how == "hook":
        experts.attach(engine)
    ranks, losses = dist.get_world_size(), []
    parts = [
        [part.chunk(accumulation * ranks)[micro * ranks + rank] for part in batch(step)]
        for step in range(len(KS))
        for micro in range(accumulation)
    ]
    for number, (context, ids, targets) in enumerate(parts):
        step, micro = divmod(number, accumulation)
        experts.k = KS[step]
        if how == "hook":
            loss = engine(ids, targets)
            engine.backward(loss)
        else:
            left = context if case.get("left") else None
            if how == "given":
                first = rank - rank % options["expert_ranks"]
                whole = [part.chunk(accumulation * ranks) for part in batch(step)[:2]]
                left, ids_PBQ = (
                    torch.stack(part[micro * ranks + first :][: options["expert_ranks"]]) for part in whole
                )
                experts._host = None  # nothing is exchanged
            with experts.planned(ids_PBQ if how == "given" else ids, left):
                loss = engine(ids, targets)
                engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / ranks)
    read = safe_get_full_fp32_param if stage else nn.Parameter.detach
    local = EXPERTS // options.get("expert_ranks", 1)
    first = rank % options.get("expert_ranks", 1) * local
    weights = {name: read(p) for name, p in engine.module.named_parameters()}
    return SimpleNamespace(
        losses=np.reshape(losses, (-1, accumulation)).mean(1).tolist(),
        weights=by_expert(weights, range(first, first + local)),
        wire=experts.comm and (experts.comm.collectives, experts.comm.sent_bytes),
        times=experts.comm and tuple(experts.comm.take_times()),
    )


SHARED = {"expert_ranks": 2}
CASES = {
    2: [
        {"stage": 0, "options": SHARED},
        {"stage": 1, "options": SHARED, "dropout": 0.3},
        {"stage": 1, "options": SHARED, "optimizer": "config", "how": "hook"},
        {"stage": 2, "options": SHARED, "accumulation": 2, "recompute": True, "left": True},
        {"stage": 2, "options": {**SHARED, "exchange": ExchangeKind.gather}, "how": "given", "left": True},
        {"stage": 3, "options": {**SHARED, "chunks": 3}, "dropout": 0.3},
        {"stage": 3, "options": SHARED, "recompute": True, "accumulation": 2, "how": "hook"},
        {"stage": 3},
        {"stage": 3, "options": {**SHARED, "chunks": 3}, "gate": True, "recompute": True},
        {"stage": 1, "options": SHARED, "gate": True, "how": "hook"},
    ],
    4: [{"stage": 1, "options": SHARED, "dropout": 0.3}, {"stage": 3, "options": SHARED, "left": True, "how": "given"}],
}


def nested(rank):
    """Do plans made ahead in a loop inside another such loop, with plans between, equal those from all ranks' ids?"""
    _, experts = make(**SHARED)
    parts = [batch(step)[1].chunk(2) for step in range(12)]
    fine = []

    def compare_plans(plans, number):
        want = experts.plan(torch.stack(parts[number]))
        pairs = zip(tensors_in(plans.plans), tensors_in(want.plans), strict=True)
        fine.append(all(torch.equal(a, b) for a, b in pairs))

    for outer, (plans, _) in enumerate(experts.ahead([part[rank]] for part in parts[:6])):
        compare_plans(plans, outer)
        if outer in (1, 3):
            for inner, (plans, _) in enumerate(experts.ahead([part[rank]] for part in parts[6:])):
                compare_plans(plans, 6 + inner)
                compare_plans(experts.plan(parts[inner][rank]), inner)
    texts = batch(0)[1] // 5  # documents
    whole = {"mask": batch(0)[1] >= 0, "documents": texts}
    here, all_of_them = (
        {name: change(value) for name, value in whole.items()}
        for change in (lambda v: v.chunk(2)[rank], lambda v: torch.stack(v.chunk(2)))
    )
    plans, want = experts.plan(parts[0][rank], **here), experts.plan(torch.stack(parts[0]), **all_of_them)
    pairs = zip(tensors_in(plans.plans), tensors_in(want.plans), strict=True)
    fine.append(all(torch.equal(a, b) for a, b in pairs))
    return len(fine) == 31 and all(fine)


def work(rank, cases):
    deepspeed.utils.logging.logger.setLevel("ERROR")
    two = dist.get_world_size() == 2
    wrong = {**mistakes(rank), "nested": nested(rank)} if two else None
    trained = [train(rank, case) for case in cases]
    return wrong, trained, resume(rank) if two else None, copies(rank) if two else None


@pytest.fixture(scope="module")
def truth():
    options = (0.0, False, False), (0.3, False, False), (0.0, True, False), (0.0, False, True)
    return {each: one_rank(*each) for each in options}


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_ranks(work, 2, CASES[2])


def compare(got, want):
    assert got.losses == pytest.approx(want.losses, rel=1e-6)
    largest = max(np.linalg.norm(value) for value in want.weights.values())
    for name, value in got.weights.items():
        difference = np.linalg.norm(value - want.weights[name])
        assert difference < 1e-6 * np.linalg.norm(want.weights[name]) + 1e-7 * largest, name


def check(answers, cases, truth):
    for index, case in enumerate(cases):
        want = truth[case.get("dropout", 0.0), case.get("left", False), case.get("gate", False)]
        for answer in answers:
            compare(answer[1][index], want)
        assert {name for answer in answers for name in answer[1][index].weights} == set(want.weights)


@pytest.mark.dist
def test_two_ranks_train_like_plain_pytorch(on_two_ranks, truth):
    check(on_two_ranks, CASES[2], truth)
    exchanges = [answer.wire and answer.wire[0] for answer in on_two_ranks[0][1]]
    # nobody takes their times: none are kept
    assert {answer.times for answer in on_two_ranks[0][1]} == {None, (0.0, 0.0)}
    per_pass = 2 * 2 * 2  # layers, there and back, directions
    steps = len(KS) * per_pass
    # Two micro-batches; once more each layer's rows to the experts, but not back, which backward does not need.
    recomputed = 2 * len(KS) * (per_pass + 2)
    gated = [3 * (steps + len(KS) * 2 * 2), steps]  # as with fixed weights; chunks repeat both directions
    assert exchanges == [steps, steps, steps, recomputed, steps, 3 * steps, recomputed, None, *gated]


@pytest.mark.dist
@pytest.mark.slow
def test_four_ranks_in_two_groups_train_like_plain_pytorch(truth):
    check(run_ranks(work, 4, CASES[4]), CASES[4], truth)


def test_three_steps_move_everything(truth):
    """Negative controls: weights move by far more than the bound, and the options make a difference that `compare`
    sees."""
    start = by_expert(dict(make()[0].named_parameters()), range(EXPERTS))
    plain, *others = truth.values()
    assert min(np.abs(plain.weights[name] - start[name]).max() for name in start) > 1e-4
    for other in others:
        with pytest.raises(AssertionError):
            compare(other, plain)


# Mistakes.


def message(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def mistakes(rank):
    """What is said when ranks do not agree, and before DeepSpeed has formed the groups."""
    model, experts = make(**SHARED)
    _, ids, targets = batch(0)

    def too_early():
        with experts.planned(ids):
            model(ids, targets)

    def other_k():
        model.train()
        experts.k = 1 + 2 * rank
        experts.plan(ids)

    def alone():
        """As of somebody who evaluates on rank 0 alone; the other rank is alive, and busy with something else."""
        _, lonely = make(timeout_s=2, **SHARED)
        said = "nothing" if rank else message(lambda: lonely.plan(ids))
        dist.barrier()
        return said

    return {
        "too early": message(too_early),
        "alone": alone(),
        "evaluation": message(lambda: (model.train(rank == 0), experts.plan(ids))),
        "k": message(other_k),
        "tables": message(lambda: make(seed=rank, **SHARED)[1].plan(ids)),
        "experts": message(lambda: make(expert_ranks=3)),
    }


@pytest.mark.dist
def test_mistakes_are_named_on_every_rank(on_two_ranks):
    for said, *_ in on_two_ranks:
        assert said["too early"].startswith("RuntimeError: experts are sharded over 2 ranks that have no group yet")
        differ = "RunFailed: the ranks of an expert group differ in their"
        assert said["evaluation"] == f"{differ} evaluation: rank 0 has 0, rank 1 has 1"
        assert said["k"] == f"{differ} k: rank 0 has 1, rank 1 has 3"
        assert said["tables"].startswith(f"{differ} tables: rank 0 has ")
        assert said["nested"]
        assert said["experts"].startswith("UserError: parallel.expert_ranks=3: must divide")
    assert on_two_ranks[0][0]["alone"].startswith(
        "RunFailed: rank 0 planned a forward pass, and not all ranks of its expert group did so within 2 s: all must"
        " run each"
    )


# Going on from what each rank has saved by itself, on as many ranks.


def resume(rank):
    """Losses of two steps after two others, without a break and from what was saved between them; and a refusal."""
    found = []
    for stage, bf16 in ((0, False), (1, False), (2, True), (3, False)):
        model, experts = make(0.3, **SHARED)
        engine = initialize(model, stage, bf16=bf16)
        steps(rank, engine, experts, 0)
        state = {"optimizer": engine.optimizer.state_dict(), "experts": experts.state_dict()}
        if stage < 3:
            state["module"] = engine.module.state_dict()
        state = {key: clone(value) for key, value in state.items()}
        want = steps(rank, engine, experts, 2)
        model, experts = make(0.3, seed=1, **SHARED)
        engine = initialize(model, stage, bf16=bf16)
        experts.load_state_dict(state["experts"])
        if stage < 3:
            engine.module.load_state_dict(state["module"])
        if stage:
            engine.optimizer.load_state_dict([state["optimizer"]] * 2, load_from_fp32_weights=True)
        else:
            engine.optimizer.load_state_dict(state["optimizer"])
        other = {**state["experts"], "place": (1 - rank, 2, 2)}
        refusal = message(lambda e=experts, o=other: e.load_state_dict(o))
        found.append((steps(rank, engine, experts, 2), want, refusal))
    return found


def copies(rank):
    """The loss of a model, of a copy, of one from a file; the tags of parameters; and what a copy in another place
    says."""
    model, experts = make(**SHARED)
    from_file = copy.deepcopy(model)
    layers = clone(nn.ModuleList(layer.mlp for layer in model.layers))
    for layer, mlp in zip(from_file.layers, layers, strict=True):
        layer.mlp = mlp
    experts_of(from_file).attach(from_file)
    initialize(model, 1)  # afterwards parameters hold what DeepSpeed cannot pickle
    _, ids, targets = (part.chunk(2)[rank] for part in batch(2))
    experts.attach(model)
    with torch.no_grad():
        first = model(ids, targets).item()  # connects the layers
    twins = [model, copy.deepcopy(model), from_file]
    with torch.no_grad():
        losses = [first, *(twin(ids, targets).item() for twin in twins)]
    names = "allreduce", "group_name", "ds_zero_placement_family", "ds_zero_partition_group_name"
    tags = [[getattr(p, name, None) for p in twin.parameters() for name in names] for twin in twins]
    moved = experts_of(copy.deepcopy(model))
    moved.planner.mesh = Mesh(1 - rank, 2, 2)
    return losses, tags, message(lambda: moved.plan(ids))


@pytest.mark.dist
def test_copies_with_shared_out_experts(on_two_ranks):
    for answer in on_two_ranks:
        losses, (tags, *others), refusal = answer[3]
        assert losses == losses[:1] * 4
        assert others == [tags, tags] and "autoep_expert" in tags
        assert "which holds other experts: must be used there" in refusal


def clone(value):
    """Through bytes, as a file would."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def steps(rank, engine, experts, first):
    losses = []
    for step in (first, first + 1):
        _, ids, targets = (part.chunk(2)[rank] for part in batch(step))
        with experts.planned(ids):
            loss = engine(ids, targets)
            engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.dist
def test_a_rank_goes_on_from_what_it_saved(on_two_ranks):
    for _, _, found, _ in on_two_ranks:
        for got, want, refusal in found:
            assert got == want
            assert "(rank, of ranks, in expert groups of)" in refusal


# The example.


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example_learns(ranks):
    """By torchrun on two ranks, as its page says."""
    printed = run_program("tests/examples/plug_in.py", 1) if ranks == 1 else _by_torchrun(ranks)
    losses = [float(line.split()[-1]) for line in printed.splitlines() if "loss" in line]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.7


def _by_torchrun(ranks):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *launcher, "tests/examples/plug_in.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["plug_in", "save_and_load"])
def test_the_documentation_shows_the_example(name):
    example = (ROOT / f"tests/examples/{name}.py").read_text()
    shown = "".join(f"    {line}".rstrip() + "\n" for line in example.splitlines())
    assert shown in (ROOT / "docs/plug_in.md").read_text()
