"""Converted models on two ranks with sharded experts at ZeRO 1 and 3 train, are saved and exported as on one.

The optimizer is linear in the gradient, as in tests/engine/hugging_face/test_expert_models.py.
"""

import deepspeed
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from foreroute.engine.config import Builder, MoEConfig, ParallelConfig, RouteWeights
from foreroute.engine.convert import Adapters, Copies, Slices
from foreroute.engine.errors import UserError
from foreroute.engine.plug_in import load_pretrained, parameter_groups, replace_feed_forwards, save_pretrained
from foreroute.engine.plug_in.saved.dense import dense_state_dict
from foreroute.engine.testing.ranks import run_ranks

SYMBOLS, WIDTH, HIDDEN, EXPERTS, ROWS, STEPS = 11, 8, 16, 4, 4, 2
ADAM = {"lr": 5000.0, "betas": (0.0, 0.999), "eps": 1e3}  # the update is 5 times the gradient
STARTS = {"copy": Copies(), "split": Slices(), "adapters": Adapters(width=6)}


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, ids, targets):
        x = self.embed(ids)
        for mlp in self.mlps:
            x = x + mlp(x)
        return cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def make(kind, expert_ranks=1):
    model, start = Host(), STARTS[kind]
    weights = RouteWeights.sum if kind == "split" else RouteWeights.table
    moe = MoEConfig(experts=EXPERTS, ngram=1, rows=SYMBOLS, builder=Builder.random, weights=weights)
    parallel = ParallelConfig(expert_ranks=expert_ranks)
    experts = replace_feed_forwards(
        model, r"mlps\.\d", width=WIDTH, vocab_size=SYMBOLS, moe=moe, k=2, start=start, parallel=parallel
    )
    with torch.no_grad():
        for layer in experts.layers if kind == "adapters" else ():  # zeros would leave W_down without a gradient
            layer.experts.w2.copy_(0.1 * layer.experts.w1)
    return model, experts


def batch(step):
    ids = torch.randint(0, SYMBOLS, (ROWS, 8), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def train_on_ranks(rank, stage, folder):
    deepspeed.utils.logging.logger.setLevel("ERROR")
    found = {}
    for kind in STARTS:
        model, experts = make(kind, dist.get_world_size())
        config = {
            "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
        }
        adam = torch.optim.Adam(parameter_groups(trained(model)), **ADAM)
        engine = deepspeed.initialize(model=model, optimizer=adam, config=config)[0]
        for step in range(STEPS):
            ids, targets = (part.chunk(dist.get_world_size())[rank] for part in batch(step))
            with experts.planned(ids):
                engine.backward(engine(ids, targets))
            engine.step()
        save_pretrained(engine, folder / kind)
        if kind == "split":
            found = {name: value.numpy() for name, value in dense_state_dict(engine.module).items()}
    return found


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_train_save_and_export_as_one(stage, tmp_path):
    exported = run_ranks(train_on_ranks, 2, stage, tmp_path)
    for kind in STARTS:
        model, experts = make(kind)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        adam = torch.optim.Adam(trained(model), **ADAM)
        for step in range(STEPS):
            ids, targets = batch(step)
            with experts.planned(ids):
                model(ids, targets).backward()
            adam.step()
            adam.zero_grad()
        loaded, _ = make(kind)
        load_pretrained(loaded, tmp_path / kind, weights_only=True)
        got = dict(loaded.named_parameters())
        for name, want in model.named_parameters():
            assert (got[name] - want).norm() <= 1e-5 * want.norm(), (kind, name)
            changed = (want - before[name]).norm() > 1e-3 * want.norm()
            assert changed == want.requires_grad == (kind != "adapters" or ".moe." in name), (kind, name)
        if kind == "split":
            own = dense_state_dict(model)
            host = Host()
            assert own.keys() == host.state_dict().keys() == exported[0].keys()
            assert all((torch.from_numpy(exported[1][name]) - own[name]).norm() < 1e-4 for name in own)
            host.load_state_dict(own)
            experts.k, (ids, targets) = EXPERTS, batch(9)
            with experts.planned(ids):
                assert model(ids, targets).item() == pytest.approx(host(ids, targets).item(), rel=1e-6)


def test_only_slices_have_a_dense_form():
    for kind in ("copy", "adapters"):
        with pytest.raises(UserError, match=r"mlps\.0.*: must be slices; only they have a dense form"):
            dense_state_dict(make(kind)[0])


def test_untrained_slices_go_home_bit_for_bit():
    state = dense_state_dict(make("split")[0])
    assert all(torch.equal(state[name], value) for name, value in Host().state_dict().items())
