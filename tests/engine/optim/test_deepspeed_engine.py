"""The adapter against plain torch: each ZeRO stage, accumulation, clipping, offload, bf16 masters, dropped steps,
state."""

import copy
import gc
import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from foreroute.engine.config import Config, DataConfig, OptimConfig, Precision, TrainConfig
from foreroute.engine.errors import UserError
from foreroute.engine.model.build import build_model
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.optim import deepspeed_engine as adapter
from foreroute.engine.optim import expert_sharding
from foreroute.engine.routing.plan import Routing
from foreroute.engine.testing.tiny_run import SYMBOLS, tiny_config


@pytest.fixture(autouse=True)
def side_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's bf16 optimizer collects garbage four times at its start: pass over what is imported. ZeRO-3 replaces
    torch.nn.functional.linear in the whole process: put it back. Here it keeps no parameter whole."""
    gc.freeze()
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)
    monkeypatch.setattr(adapter, "KEPT_WHOLE", 0)


def test_parameters_of_odd_sizes_come_last():
    """In a flat buffer of them, each but those starts where 16 bytes begin, in bf16 too."""
    sizes = [(204,), (204, 8), (3,), (4, 10), (16,), (5, 16)]
    given = [nn.Parameter(torch.zeros(size)) for size in sizes]
    ordered = expert_sharding.aligned_first(given)
    assert [tuple(p.shape) for p in ordered] == [(204, 8), (4, 10), (16,), (5, 16), (204,), (3,)]
    starts = list(itertools.accumulate((p.numel() for p in ordered), initial=0))
    assert all(start % 8 == 0 for start in starts[:5]) and starts[5] % 8


@pytest.mark.parametrize(("stage", "precision"), [(1, Precision.bf16), (1, Precision.fp32), (2, Precision.bf16)])
def test_weights_of_experts_start_on_16_bytes(stage, precision):
    """The vocabulary of 13 gives a bias whose size no power of 2 divides, and it is the model's first parameter."""
    config = tiny_config()
    train = replace(config.train, zero_stage=stage, precision=precision)
    config = replace(config, train=train, optim=replace(config.optim, clip=1.0))
    model = build_model(config, 13)
    assert any(p.numel() % 8 for p in model.parameters())
    adapter.start(model, config)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters() if ".experts." in name}
    assert pointers and all(pointer % 16 == 0 for pointer in pointers.values()), pointers


class Output(NamedTuple):
    loss: Tensor
    memory: tuple[Tensor, ...]
    count_LE: Tensor | None = None


class Experts(nn.Module):
    def __init__(self, experts: int = 3, width: int = 8, hidden: int = 5) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(experts, hidden, width) * 0.4)
        self.b1 = nn.Parameter(torch.randn(experts, hidden) * 0.1)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, width) * 0.4)
        self.b2 = nn.Parameter(torch.randn(experts, width) * 0.1)

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden_ETF = torch.relu(torch.einsum("td,efd->etf", x_TD, self.w1) + self.b1[:, None])
        return (torch.einsum("etf,efd->etd", hidden_ETF, self.w2) + self.b2[:, None]).mean(0)


class Tiny(nn.Module):
    """Parameters of odd sizes, experts, and a buffer that bf16 must not touch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([nn.ModuleDict({"moe": nn.ModuleDict({"experts": Experts()})})])
        self.out = nn.Linear(8, 11)
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("gate_weight", torch.randn(3, 8) / 3)

    def forward(self, ids: Tensor, targets: Tensor) -> Output:
        x = self.embed(ids).flatten(0, 1)
        x = x + self.get_submodule("blocks.0.moe.experts")(x)
        logits = self.out(x).float() * self.gain.float().mean()
        return Output(nn.functional.cross_entropy(logits, targets.flatten()), (x.detach(),))


def config(stage: int, clip: float = 0.0, **train: Any) -> Config:
    return Config(
        data=DataConfig(streams=4, segment=6),
        optim=OptimConfig(lr=0.01, clip=clip),
        train=TrainConfig(zero_stage=stage, **train),
    )


def model(seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, 11, (4, 7), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def train(engine: adapter.Engine, steps: int, micro_batches: int = 1) -> list[float]:
    losses = []
    for step in range(steps):
        engine.set_lr(0.01 / (step + 1))
        total = 0.0
        ids, targets = batch(step)
        for i, t in zip(ids.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
            loss = engine.forward(i, t).loss
            engine.backward(loss)
            total += loss.item() / micro_batches
        assert engine.step()
        losses.append(total)
    return losses


def compute_copy(engine: adapter.Engine, name: str) -> Tensor:
    """The weight that the forward pass uses."""
    param = engine.module.get_parameter(name)
    if not hasattr(param, "ds_id"):
        return param.detach()
    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().clone()


def train_plainly(module: nn.Module, steps: int, clip: float) -> tuple[list[float], list[float], torch.optim.Adam]:
    adam = torch.optim.Adam(module.parameters(), lr=1.0)
    losses, norms = [], []
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.01 / (step + 1)
        adam.zero_grad()
        loss = module(*batch(step)).loss
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), clip or float("inf")).item())
        adam.step()
        losses.append(loss.item())
    return losses, norms, adam


@pytest.mark.parametrize(
    "stage,clip,offload", [(0, 0.0, False), *itertools.product((1, 2, 3), (0.0, 0.1), (False, True))]
)
def test_five_steps_equal_plain_torch(stage: int, clip: float, offload: bool) -> None:
    reference = model()
    engine = adapter.start(copy.deepcopy(reference), config(stage, clip, offload=offload))
    losses, norms, adam = train_plainly(reference, 5, clip)
    assert train(engine, 5) == pytest.approx(losses, rel=1e-6)
    assert engine.grad_norm.item() == pytest.approx(norms[-1], rel=1e-5)
    assert clip == 0 or min(norms) > clip  # the clip really acts
    assert engine.adam_step() == 5
    wanted = dict(reference.named_parameters())
    seen = []
    for name, state in engine.read_state():
        seen.append(name)
        assert error(state["weight"], wanted[name]) < 1e-6
        assert torch.equal(compute_copy(engine, name), state["weight"])
        for key in adapter.MOMENTS:
            assert state[key].shape == wanted[name].shape
            assert error(state[key], adam.state[wanted[name]][key]) < 2e-6
    assert seen == list(wanted)
    assert engine.shapes() == {name: tuple(param.shape) for name, param in wanted.items()}
    assert engine.num_parameters() == sum(param.numel() for param in wanted.values())


def test_clipping_changes_the_result() -> None:
    plain, clipped = model(), model()
    train_plainly(plain, 5, 0.0)
    train_plainly(clipped, 5, 0.1)
    assert error(clipped.out.weight, plain.out.weight) > 1e-5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_micro_batches_equal_one_batch(stage: int) -> None:
    clip = 0.1 if stage else 0.0
    whole = adapter.start(model(), config(stage, clip))
    losses = train(whole, 3)
    halves = adapter.start(model(), config(stage, clip, accumulation=2))
    assert train(halves, 3, micro_batches=2) == pytest.approx(losses, rel=1e-6)
    assert halves.grad_norm.item() == pytest.approx(whole.grad_norm.item(), rel=1e-5)
    assert halves.adam_step() == 3
    for (_, a), (_, b) in zip(halves.read_state(), whole.read_state(), strict=True):
        assert error(a["exp_avg"], b["exp_avg"]) < 1e-6  # Adam's weights would hide a wrong scale
        assert error(a["exp_avg_sq"], b["exp_avg_sq"]) < 2e-6


def test_step_only_at_the_boundary() -> None:
    engine = adapter.start(model(), config(1, accumulation=2))
    ids, targets = batch(0)
    before = engine.module.get_parameter("out.weight").clone()
    engine.backward(engine.forward(ids[:2], targets[:2]).loss)
    with pytest.raises(RuntimeError, match="1 of 2"):
        engine.step()
    assert torch.equal(engine.module.get_parameter("out.weight"), before)
    engine.backward(engine.forward(ids[2:], targets[2:]).loss)
    with pytest.raises(RuntimeError, match="is due"):
        engine.backward(engine.forward(ids[2:], targets[2:]).loss)
    assert engine.step()
    assert not torch.equal(engine.module.get_parameter("out.weight"), before)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_keeps_fp32_masters(stage: int, offload: bool) -> None:
    engine = adapter.start(model(), config(stage, 0.25, precision=Precision.bf16, offload=offload))
    gate = engine.module.get_buffer("gate_weight")
    assert gate.dtype == torch.float32 and torch.equal(gate, model().get_buffer("gate_weight"))
    losses = []
    for _ in range(20):
        loss = engine.forward(*batch(0)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    differ = 0
    for name, state in engine.read_state():
        param = compute_copy(engine, name)
        assert param.dtype == torch.bfloat16 and state["weight"].dtype == torch.float32
        assert torch.equal(param, state["weight"].bfloat16())
        differ += int(not torch.equal(param.float(), state["weight"]))
    assert differ >= 6


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_accumulates_in_fp32(stage: int) -> None:
    """One large and three tiny gradients: a sum in bf16 would lose the tiny ones."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4))

        def forward(self, factor: Tensor) -> Tensor:
            return (self.w.float() * factor).sum()

    setup = config(stage, precision=Precision.bf16, accumulation=4)
    engine = adapter.start(Scale(), setup)
    for factor in (1.0, 2**-9, 2**-9, 2**-9):
        engine.backward(engine.forward(torch.tensor(factor)))
    engine.step()
    ((_, state),) = engine.read_state()
    wanted = 0.1 * (1 + 3 * 2**-9) / 4
    assert state["exp_avg"].tolist() == pytest.approx([wanted] * 4, rel=1e-6)


@pytest.mark.parametrize(
    "stage,precision",
    [(0, Precision.fp32), (1, Precision.fp32), (3, Precision.fp32)] + [(stage, Precision.bf16) for stage in (1, 2, 3)],
)
def test_a_step_that_is_not_finite_is_dropped(stage: int, precision: Precision) -> None:
    engine = adapter.start(model(), config(stage, precision=precision))
    train(engine, 1)
    before = {name: state["weight"].clone() for name, state in engine.read_state()}
    engine.backward(engine.forward(*batch(1)).loss * float("nan"))
    assert not engine.step()
    assert not engine.grad_norm.isfinite()
    assert engine.adam_step() == 1
    assert all(torch.equal(state["weight"], before[name]) for name, state in engine.read_state())
    train(engine, 1)
    assert engine.adam_step() == 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_update_that_is_not_wanted_is_dropped(stage: int) -> None:
    """By a flag on the device, such as that of a loss that is not finite; the norm is told all the same."""
    engine = adapter.start(model(), config(stage))
    before = {name: state["weight"].clone() for name, state in engine.read_state()}
    for unless in (torch.tensor(True), torch.tensor(False)):
        engine.backward(engine.forward(*batch(1)).loss)
        assert bool(engine.step(unless=unless)) != bool(unless)
        assert engine.grad_norm.isfinite() and engine.adam_step() == int(not unless)
        now = {name: state["weight"].clone() for name, state in engine.read_state()}
        assert all(torch.equal(now[name], before[name]) for name in now) == bool(unless)


@pytest.mark.parametrize(
    "stage,offload,whole", [(0, False, 0), *itertools.product((1, 2, 3), (False, True), (0,)), (3, False, 100_000)]
)
def test_written_state_is_read_back_and_used(
    stage: int, offload: bool, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "KEPT_WHOLE", whole)
    source = adapter.start(model(1), config(stage, offload=offload))
    train(source, 3)
    stored = [(name, {k: v.clone() for k, v in state.items()}) for name, state in source.read_state()]
    losses = train(source, 2)
    target = adapter.start(model(2), config(stage, offload=offload))
    train(target, 1)
    for name, state in stored:
        target.write_state(name, state)
    target.set_adam_step(3)
    for name, state in stored:
        assert torch.equal(compute_copy(target, name), state["weight"])
    assert train(target, 2) == losses
    for (_, a), (_, b) in zip(target.read_state(), source.read_state(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_zero_3_holds_no_whole_weight_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = adapter.start(model(), config(3))
    train(engine, 1)
    assert all(param.numel() == 0 for param in engine.module.parameters())
    monkeypatch.setattr(adapter, "KEPT_WHOLE", 20)
    engine = adapter.start(model(), config(3))
    train(engine, 1)
    whole = {name for name, param in engine.module.named_parameters() if param.numel()}
    assert whole == {name for name, param in model().named_parameters() if param.numel() <= 20}


@pytest.mark.parametrize("router", ["frozen", "learned", "dense"])
def test_zero_3_with_routers_inside_the_model(router: str) -> None:
    """A gate's weight is gathered for its backward pass too; without experts nothing is special."""

    def run(stage: int, recompute: bool) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
        setup = tiny_config(stage, recompute=recompute)
        setup = replace(setup, moe=replace(setup.moe, router=router, balance_loss=0.0))
        engine = adapter.start(build_model(setup, SYMBOLS), setup)
        ids = torch.randint(0, SYMBOLS, (4, 17), generator=torch.Generator().manual_seed(0))
        losses = []
        for _ in range(3):
            loss = engine.forward(ids[:, :-1], ids[:, 1:], None, Routing(2)).loss
            engine.backward(loss)
            assert engine.step()
            losses.append(loss.item())
        moments = {name: state["exp_avg"].clone() for name, state in engine.read_state()}
        return losses, moments, {name: b.clone() for name, b in engine.module.named_buffers()}

    losses, moments, buffers = run(1, recompute=False)
    assert losses[2] < losses[0]
    for recompute in (False, True):
        got = run(3, recompute)
        assert got[0] == pytest.approx(losses, rel=1e-6)
        assert all(error(got[1][name], value) < 1e-5 for name, value in moments.items())
        assert all(torch.equal(got[2][name], value) for name, value in buffers.items())
    gates = [name for name in (*moments, *buffers) if name.endswith("gate_weight")]
    assert len(gates) == (0 if router == "dense" else 2)


@pytest.mark.parametrize("whole", [0, 50, 100_000])  # at 50 some parameters stay whole
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_validation_between_steps_changes_nothing(guard: Any, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "KEPT_WHOLE", whole)
    losses = train(adapter.start(model(), config(3)), 2)
    engine = adapter.start(model(), config(3))
    for _ in range(2):  # also before the first step, when nothing is gathered
        engine.module.eval()
        with guard():
            assert engine.module(*batch(0)).loss.item() == losses[0]
        engine.module.train()
        state = list(engine.read_state())
        assert train(engine, 2) == losses
        for name, values in state:  # back to the start, from weights gathered by a validation
            with guard():
                engine.module(*batch(0))
            engine.write_state(name, values)
        engine.set_adam_step(0)


@pytest.mark.parametrize("stage", [1, 2])
def test_state_of_every_parameter_group_is_linked(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_groups(params: Any, optim: OptimConfig) -> torch.optim.Optimizer:
        tensors = list(params)
        groups = [{"params": tensors[:3]}, {"params": tensors[3:]}]
        return torch.optim.Adam(groups, optim.lr, fused=True)

    monkeypatch.setattr(adapter, "build_optimizer", two_groups)
    engine, reference = adapter.start(model(), config(stage)), model()
    train(engine, 3)
    _, _, adam = train_plainly(reference, 3, 0.0)
    for name, state in engine.read_state():
        wanted = adam.state[reference.get_parameter(name)]["exp_avg"]
        assert error(state["exp_avg"], wanted) < 1e-6


@pytest.mark.parametrize(
    "setup,message",
    [
        (config(0, 0.25), "optim.clip=0.25"),
        (config(0, precision=Precision.bf16), "train.precision=bf16.*zero_stage=1, 2 or 3"),
    ],
)
def test_what_deepspeed_gets_wrong_is_refused(setup: Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapter.start(model(), setup)


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_start_is_quiet(stage: int, capfd: pytest.CaptureFixture[str]) -> None:
    train(adapter.start(model(), config(stage, 0.25, precision=Precision.bf16, offload=stage == 3)), 1)
    assert capfd.readouterr() == ("", "")


def test_the_configuration_that_deepspeed_gets():
    """Of bf16 gradients are added up in fp32; a step that is not finite is dropped; what it logs by itself is never
    due."""
    config = replace(tiny_config(2, clip=0.5, precision=Precision.bf16), data=DataConfig(streams=8))
    config = replace(config, train=replace(config.train, accumulation=2))
    assert adapter._deepspeed_config(config.train, 0.5, streams=2, num_params=1000) == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "round_robin_gradients": False},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    plain = adapter._deepspeed_config(tiny_config(1).train, 0.0, streams=1, num_params=10**12)
    assert plain["zero_optimization"]["reduce_bucket_size"] == adapter.MAX_BUCKET < 10**9
    assert not {"bf16", "data_types", "communication_data_type"} & set(plain)
    full = adapter._deepspeed_config(tiny_config(3, offload=True).train, 0.0, streams=1, num_params=10)[
        "zero_optimization"
    ]
    assert full["stage3_param_persistence_threshold"] == adapter.KEPT_WHOLE
    assert full["offload_optimizer"] == {"device": "cpu"}


def test_experts_of_one_rank_are_not_shared_out():
    engine = adapter.start(build_model(tiny_config(), SYMBOLS), tiny_config())
    layers = [module for module in engine.module.modules() if isinstance(module, MoELayer)]
    assert engine.comm is None and len(layers) == 2
    assert {type(layer) for layer in layers} == {MoELayer}
    assert not any(hasattr(p, "allreduce") for p in engine.module.parameters())
