"""A user's model with expert layers, saved and loaded: training goes on as if it had never stopped."""

import copy
import shutil

import pytest
import torch
from torch import nn

from foreroute.engine.config import Builder, MoEConfig
from foreroute.engine.plug_in import experts_of, load_pretrained, replace_feed_forwards, save_pretrained

SYMBOLS, WIDTH, EXPERTS, K, ROWS, LENGTH = 11, 16, 6, 2, 6, 9
MOE = MoEConfig(experts=EXPERTS, expert_width=12, ngram=2, rows=64, builder=Builder.random, shared_width=8)
ADAM = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-3}  # a smaller eps makes rounding noise whole steps


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.Linear(WIDTH, WIDTH)  # a name as ours, of nothing of ours
        self.drop = nn.Dropout(0.2)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 40), nn.ReLU(), nn.Linear(40, WIDTH))

    def forward(self, x):
        x = x + self.experts(self.drop(self.mix(x.cumsum(1) / LENGTH)))
        return x + self.mlp(x)


class Theirs(nn.Module):
    """Tied weights, a frozen parameter, one that no pass uses, and a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(SYMBOLS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, SYMBOLS)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.rand(WIDTH), requires_grad=False)
        self.unused = nn.Parameter(torch.rand(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, ids, targets):
        self.calls += 1
        x = self.embed(ids) * self.scale
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def make(seed=0, moe=MOE, kind=Theirs, pattern=r"layers\.\d+\.mlp", **options):
    torch.manual_seed(seed)
    model = kind()
    options = {"width": WIDTH, "vocab_size": SYMBOLS, "k": K, "dropout": 0.1, "init_std": 0.3, "seed": seed, **options}
    replace_feed_forwards(model, pattern, moe=moe, **options)
    return model


def batch(step):
    ids = torch.randint(0, SYMBOLS, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return ids[:, :-1], ids[:, 1:]


class Training:
    """A model with its optimizer and scheduler in plain PyTorch."""

    def __init__(self, seed=0, optimizer=torch.optim.Adam, groups=1, maker=make, **options):
        self.model = maker(seed, **options)
        params = list(self.model.parameters())
        split = [params[:3], params[3:]] if groups == 2 else [params]
        adam = {} if optimizer is torch.optim.SGD else {k: v for k, v in ADAM.items() if k != "lr"}
        self.optimizer = optimizer([{"params": part} for part in split], lr=0.01, **adam)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4], gamma=0.5)

    def steps(self, first, last):
        losses = []
        for step in range(first, last):
            ids, targets = batch(step)
            with experts_of(self.model).planned(ids):
                loss = self.model(ids, targets)
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def save(self, folder, **options):
        return save_pretrained(self.model, folder, optimizer=self.optimizer, scheduler=self.scheduler, **options)

    def load(self, folder, **options):
        load_pretrained(self.model, folder, optimizer=self.optimizer, scheduler=self.scheduler, **options)

    def weights(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def same(got, want):
    return got.keys() == want.keys() and all(torch.equal(value, want[name]) for name, value in got.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder after three steps, the training's next losses and its weights after them."""
    training = Training()
    training.steps(0, 3)
    experts_of(training.model).k = 3
    at_save = copy.deepcopy(training.weights())
    folder = training.save(tmp_path_factory.mktemp("saved") / "model")
    losses = training.steps(3, 6)
    return folder, at_save, losses, training.weights()


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved[0], tmp_path / "model")


def test_training_goes_on_bit_for_bit(saved):
    path, at_save, losses, weights = saved
    training = Training(seed=9)
    training.load(path)
    assert same(training.weights(), at_save)
    assert training.steps(3, 6) == losses and same(training.weights(), weights)
    assert experts_of(training.model).k == 3 and training.model.calls == 6


@pytest.mark.parametrize("what", ["exp_avg", "exp_avg_sq", "step", "lr", "k", "passes", "random", "schedule"])
def test_a_change_of_what_is_saved_is_noticed(what, saved):
    """Negative control: each of these decides the steps that follow."""
    path, _, losses, weights = saved
    training = Training(seed=9)
    training.load(path)
    state = training.optimizer.state[training.model.head.bias]
    if what == "lr":
        training.optimizer.param_groups[0]["lr"] *= 1.001
    elif what == "k":
        experts_of(training.model).k = 2
    elif what == "passes":
        experts_of(training.model)._passes += 1
    elif what == "random":
        torch.manual_seed(1)
    elif what == "schedule":
        training.scheduler.last_epoch += 1
    else:
        state[what] *= 1.01
    assert training.steps(3, 6) != losses or not same(training.weights(), weights)


def test_other_groups_of_the_optimizer_take_the_same_state(saved):
    path, _, losses, weights = saved
    training = Training(seed=9, groups=2)
    training.load(path)
    assert training.steps(3, 6) == losses and same(training.weights(), weights)
