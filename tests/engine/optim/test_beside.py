"""Parameters beside the module's, such as rows of tables: one norm, one clipping and one refusal with those of ZeRO."""

import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreroute.engine.config import Config, DataConfig, OptimConfig, Precision, TrainConfig
from foreroute.engine.errors import UserError
from foreroute.engine.ngram_tables.row_rules import RowAdam
from foreroute.engine.ngram_tables.store import RowStore
from foreroute.engine.optim import deepspeed_contract as contract
from foreroute.engine.optim import deepspeed_engine as adapter

ROWS, WIDTH, STEPS = 12, 6, 5


@pytest.fixture(autouse=True)
def side_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_deepspeed_engine.py."""
    gc.freeze()
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)
    monkeypatch.setattr(adapter, "KEPT_WHOLE", 0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, 5)
        nn.init.normal_(self.map.weight, std=2.0)  # so that the rows' gradients weigh

    def forward(self, x_RW: Tensor, target_R: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.map(x_RW.to(self.map.weight.dtype)).float(), target_R)


class Rows:
    """All rows of a table, in every step."""

    def __init__(self) -> None:
        self.store = RowStore(ROWS, WIDTH, rank=0, world=1, seed=1, index=0, scale=1.0, rule=RowAdam())
        self.all, self.steps, self.kept = torch.arange(ROWS), 0, list[bool]()
        self.leaf = torch.empty(0)

    def read(self) -> Tensor:
        self.leaf = self.store.read(self.all).requires_grad_()
        return self.leaf

    def return_gradients(self) -> None:
        """Nothing moves on one rank."""

    def grad_norm(self) -> Tensor:
        assert self.leaf.grad is not None
        return self.leaf.grad.norm()

    def update(self, *, lr: float, scale: Tensor, keep: Tensor) -> None:
        assert self.leaf.grad is not None
        self.steps += 1
        self.store.update(self.all, self.leaf.grad * scale, step=self.steps, lr=lr, keep=keep)
        self.kept.append(bool(keep))


def config(stage: int, clip: float = 0.0, **train: Any) -> Config:
    return Config(
        data=DataConfig(streams=4, segment=6),
        optim=OptimConfig(lr=0.01, clip=clip),
        train=TrainConfig(zero_stage=stage, **train),
    )


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def targets(step: int) -> Tensor:
    return torch.randint(0, 5, (ROWS,), generator=torch.Generator().manual_seed(step))


def train(setup: Config, *, beside: bool = True) -> tuple[adapter.Engine, Rows, list[float]]:
    engine, rows, norms = adapter.start(net(), setup), Rows(), []
    engine.beside = (rows,) if beside else ()
    for step in range(STEPS):
        engine.set_lr(0.01 / (step + 1))
        engine.backward(engine.forward(rows.read(), targets(step)))
        assert engine.step()
        norms.append(engine.grad_norm.item())
    return engine, rows, norms


def plainly(clip: float) -> tuple[Net, Tensor, list[float]]:
    """One Adam of torch over the module and the rows; its norm and clipping are over all of them."""
    module, rows, norms = net(), Rows().read(), []
    adam = torch.optim.Adam([*module.parameters(), rows])
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = 0.01 / (step + 1)
        adam.zero_grad()
        module(rows, targets(step)).backward()
        norms.append(nn.utils.clip_grad_norm_([*module.parameters(), rows], clip or float("inf")).item())
        adam.step()
    return module, rows.detach(), norms


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    "stage,clip,offload",
    [(0, 0.0, False), (1, 0.0, False), (3, 0.0, False), *itertools.product((1, 2, 3), (0.1,), (False, True))],
)
def test_the_norm_and_clipping_are_of_all_parameters(stage: int, clip: float, offload: bool) -> None:
    module, rows, norms = plainly(clip)
    engine, beside, found = train(config(stage, clip, offload=offload))
    assert found == pytest.approx(norms, rel=1e-5)
    assert clip == 0 or min(norms) > 2 * clip  # clipping acts
    state = dict(engine.read_state())
    assert error(state["map.weight"]["exp_avg_sq"], _second(module, clip)) < 1e-5
    assert error(state["map.weight"]["weight"], module.map.weight.detach()) < 1e-6
    assert error(beside.store.state["value"], rows) < 1e-6
    assert beside.kept == [True] * STEPS


def _second(module: Net, clip: float) -> Tensor:
    """The second moment, in which Adam does not hide a wrong factor."""
    other, rows = net(), Rows().read()
    adam = torch.optim.Adam([*other.parameters(), rows])
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = 0.01 / (step + 1)
        adam.zero_grad()
        other(rows, targets(step)).backward()
        nn.utils.clip_grad_norm_([*other.parameters(), rows], clip or float("inf"))
        adam.step()
    assert torch.equal(other.map.weight, module.map.weight)
    found: Tensor = adam.state[other.map.weight]["exp_avg_sq"]
    return found


def test_without_the_rows_the_norm_is_another() -> None:
    """Negative control."""
    _, _, norms = plainly(0.0)
    _, _, found = train(config(1), beside=False)
    assert found[0] < 0.95 * norms[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_bf16(stage: int) -> None:
    """Clipped to a tenth, weights and rows get gradients of that joint norm: read from Adam's first moments."""
    engine, rows = adapter.start(net(), config(stage, 0.1, precision=Precision.bf16)), Rows()
    engine.beside = (rows,)
    engine.backward(engine.forward(rows.read(), targets(0)))
    assert rows.leaf.grad is not None
    own = rows.leaf.grad.norm().item()
    assert engine.step()
    assert engine.grad_norm.item() > own > 0.1
    parts = [state["exp_avg"] for _, state in engine.read_state()] + [rows.store.state["exp_avg"]]
    assert torch.cat([part.flatten() for part in parts]).norm().item() == pytest.approx(0.1 * 0.1, rel=1e-4)
    assert parts[-1].norm().item() == pytest.approx(0.1 * 0.1 * own / engine.grad_norm.item(), rel=1e-4)


@pytest.mark.parametrize(
    "stage,precision",
    [(stage, Precision.fp32) for stage in (0, 1, 2, 3)] + [(stage, Precision.bf16) for stage in (1, 2, 3)],
)
@pytest.mark.parametrize("where", ["rows", "module", "unless"])
def test_a_refused_step_changes_neither(stage: int, precision: Precision, where: str) -> None:
    engine, rows = adapter.start(net(), config(stage, precision=precision)), Rows()
    engine.beside = (rows,)
    engine.backward(engine.forward(rows.read(), targets(0)))
    assert engine.step()
    before = {name: state["weight"].clone() for name, state in engine.read_state()}
    kept = {name: value.clone() for name, value in rows.store.state.items()}
    loss = engine.forward(rows.read(), targets(1))
    engine.backward(loss * float("nan") if where == "module" else loss)
    assert rows.leaf.grad is not None
    if where == "rows":  # those of another rank, perhaps: the module's are finite
        rows.leaf.grad[3, 1] = float("inf")
    if where == "module":
        rows.leaf.grad = torch.zeros_like(rows.leaf)
    assert not engine.step(unless=torch.tensor(True) if where == "unless" else None)
    assert engine.grad_norm.isfinite() == (where == "unless")
    assert all(torch.equal(state["weight"], before[name]) for name, state in engine.read_state())
    assert all(torch.equal(value, kept[name]) for name, value in rows.store.state.items())
    assert rows.kept == [True, False]


@pytest.mark.parametrize("module", [*contract.ZERO_STEPS, contract.bf16_optimizer])
def test_a_deepspeed_whose_step_computes_the_norm_elsewhere_is_refused(module: Any) -> None:
    name = contract.NORMS_NAME if module in contract.ZERO_STEPS else contract.BF16_NORM_NAME
    assert callable(getattr(module, name))
    contract.require_names(module, name)
    with pytest.raises(UserError, match=f"{module.__name__} has no {name}x "):
        contract.require_names(module, name + "x")


def test_deepspeed_has_its_own_functions_after_a_step() -> None:
    places = [(module, contract.NORMS_NAME) for module in contract.ZERO_STEPS]
    places.append((contract.bf16_optimizer, contract.BF16_NORM_NAME))
    theirs = [getattr(module, name) for module, name in places]
    train(config(2, 0.1))
    assert [getattr(module, name) for module, name in places] == theirs
