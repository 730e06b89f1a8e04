"""The parts that need torch, triton, numpy and numba alone, except speed.py and tile_sweep.py.

Each returns its figures, and under "failed" a line for each fault.

Letters: T tokens, D width, F expert hidden width, L experts, K active experts.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_check.setting import Setting, in_processes
from foreroute.engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    KernelsConfig,
    ModelConfig,
    MoEConfig,
    ScheduleConfig,
)
from foreroute.engine.config.enums import Backend
from foreroute.engine.model.build import build_model
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.nested import map_tensors, tensors_in
from foreroute.engine.routing.plan import Plan, Routing, layer_seeds
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import GroupTokens
from foreroute.engine.routing.tables import build_tables
from foreroute.engine.testing.read_backs import ReadBacks
from foreroute.kernels import Dropout, ExpertRows, combine, expert_ffn, moe_ffn, permute_rows
from foreroute.kernels.activations import ACTIVATIONS
from foreroute.kernels.testing.cases import make_case, run_layer, run_with_gradients, worst_error
from foreroute.kernels.testing.interpreter import bf16_semantics

SMALL = ((37, 20, 40, 5, 3), (1, 4, 4, 3, 1), (0, 4, 4, 3, 2))  # T, D, F, L, K: nothing divides by anything
LARGE = ((1000, 256, 512, 16, 8), (333, 200, 136, 7, 3), (4096, 512, 512, 64, 2))
# of a relative norm: rounding of the inputs is in the reference, that of hidden units, outputs and gradients is not
TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 4e-2}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VOCAB, PLANS, STEPS, CLOSE = 64, 100, 200, 2e-2


class Job(NamedTuple):
    """One case of the layer."""

    shape: tuple[int, int, int, int, int]
    name: str  # key of DTYPES
    gated: bool
    rate: float  # of dropout
    activation: str | None = None  # as for kernels.moe_ffn


def kernels(setting: Setting) -> dict[str, Any]:
    """Compare every kernel with the reference, in several processes; breadth first."""
    shapes = SMALL if setting.dry_run else (*SMALL, *LARGE)
    cases = itertools.product((0.0, 0.3), (False, True), shapes, DTYPES)
    jobs = [Job(shape, name, gated, rate) for rate, gated, shape, name in cases]
    if setting.dry_run:  # the interpreter has no tf32, and is slow
        jobs = [job for job in jobs if job.name != "tf32" and (job.shape != SMALL[0] or job.gated == bool(job.rate))]
    others = [(gated, name) for name in ACTIVATIONS for gated in (False, True) if name != ("silu" if gated else "relu")]
    jobs += [Job(SMALL[1] if setting.dry_run else LARGE[0], "fp32", gated, 0.3, name) for gated, name in others]
    found = in_processes(partial(compare, device=setting.device), jobs, setting.seconds)
    worst: dict[str, float] = {}
    failed = []
    for number, errors in found.items():
        job = jobs[number]
        if isinstance(errors, Exception):
            failed.append(f"{job}: {type(errors).__name__}: {(str(errors).splitlines() or [''])[0]}")
            continue
        for kernel, (error, tensor) in errors.items():
            worst[job.name] = max(worst.get(job.name, 0.0), error)
            if not error <= TOLERANCE[job.name]:
                failed.append(f"{kernel} {job}: {tensor} is off by {error:.1e}")
    failed += [f"{name}: no case was done in {setting.seconds:.0f} s" for name in {j.name for j in jobs} - worst.keys()]
    errors_by_name = {f"error_{name}": error for name, error in worst.items()}
    return {"failed": failed, "cases": len(found), "left_out": len(jobs) - len(found), **errors_by_name}


def compare(job: Job, *, device: str) -> dict[str, tuple[float, str]]:
    """Return each kernel's largest error in a case, and the tensor that has it."""
    dtype, precision = DTYPES[job.name], "tf32" if job.name == "tf32" else "ieee"
    case, tokens = make_case(job.shape, gated=job.gated).rounded(dtype), job.shape[0]
    with ExitStack() as stack:
        if device == "cpu" and dtype is torch.bfloat16:
            stack.enter_context(bf16_semantics())
        options: dict[str, Any] = {"activation": job.activation, **_dropout(job.rate, tokens, "cpu")}
        want = run_layer(moe_ffn, case, torch.float64, backend="reference", **options)
        options |= {"backend": "triton", "precision": precision, **_dropout(job.rate, tokens, device)}
        found = {"moe_ffn": (run_layer(moe_ffn, case, dtype, device=device, **options), want)}
        if not job.rate and tokens > 0:
            found |= _steps_of_the_layer(case, dtype, device, precision)
    return {kernel: worst_error(got, wanted) for kernel, (got, wanted) in found.items()}


def reads(setting: Setting) -> dict[str, Any]:
    """Run a planned layer forward and backward where waiting for the device is an error."""
    layer, x_TD, plan = _layer(setting.device)
    call = _call(plan)
    _gradients(layer, x_TD, call)  # compiles
    with _no_reads(setting.dry_run):
        _gradients(layer, x_TD, call)
    try:
        with _no_reads(setting.dry_run):
            x_TD.sum().item()
    except RuntimeError:
        return {"reads": 0}
    return {"failed": ["a planted read is not seen"]}


def graph(setting: Setting) -> dict[str, Any]:
    """Replay one graph with many plans; without a GPU the same buffers are run again."""
    layer, x_TD, plan = _layer(setting.device)
    static, own_x_TD = _copy(plan, x_TD.device), x_TD.detach().clone().requires_grad_()
    call = _call(static)
    run = partial(_gradients, layer, own_x_TD, call)
    replay = run if setting.dry_run else _captured(run)
    different = 0
    count = 2 if setting.dry_run else PLANS
    for number in range(count):
        plan = _plan(number + 1, x_TD.device)
        for mine, new in zip(tensors_in(static), tensors_in(plan), strict=True):
            mine.copy_(new)
        want = _gradients(layer, x_TD, _call(plan))
        different += not all(torch.equal(a, b) for a, b in zip(replay(), want, strict=True))
    return {"failed": [f"{different} of {count} plans give other bits"] if different else [], "plans": count}


def training(setting: Setting) -> dict[str, Any]:
    """Train a small model with torch's Adam on the device and on the CPU."""
    steps = 2 if setting.dry_run else STEPS
    want = _train("cpu", Backend.cpu, steps)
    got = _train(setting.device, Backend.triton, steps)
    apart = max(abs(a - b) / b for a, b in zip(got, want, strict=True))
    fine = apart <= CLOSE and (setting.dry_run or got[-1] < 0.9 * got[0])
    failed = [] if fine else [f"losses are up to {apart:.1e} apart: {got[0]:.3f} to {got[-1]:.3f}"]
    return {"failed": failed, "apart": apart, "first_loss": got[0], "last_loss": got[-1]}


def _dropout(rate: float, tokens: int, device: str) -> dict[str, Any]:
    return {"dropout": Dropout(rate, 12345, torch.arange(tokens, device=device), first_expert=2)} if rate else {}


def _steps_of_the_layer(
    case: Any, dtype: torch.dtype, device: str, precision: str
) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Compute moe_ffn step by step: the experts, the weighted sum, and rows moved there and back."""
    here = ExpertRows(*(index.to(device) for index in case.rows.tensors()))
    index = case.rows.source_N

    def steps(backend: str, dtype: torch.dtype, device: str, rows: ExpertRows) -> dict[str, dict[str, Tensor]]:
        wide = torch.promote_types(dtype, torch.float32)
        x_TD, weight_N = case.x_TD.to(device, dtype), case.weight_N.to(device, wide)
        weights = type(case.weights)(*(w if w is None else w.to(device, dtype) for w in case.weights))
        y_ND = permute_rows(x_TD, index.to(device), backend=backend)
        options: dict[str, Any] = {"backend": backend}
        if backend == "triton":
            options["precision"] = precision
        moved_N = index.to(device)
        return {
            "expert_ffn": run_with_gradients(lambda x: expert_ffn(x, weights, rows, **options), {"x": x_TD}),
            "combine": run_with_gradients(
                lambda y, weight: combine(y, weight, rows, backend=backend), {"y": y_ND, "weight": weight_N}
            ),
            "permute_rows": run_with_gradients(lambda x: permute_rows(x, moved_N, backend=backend), {"x": x_TD}),
        }

    got = steps("triton", dtype, device, here)
    want = steps("reference", torch.float64, "cpu", case.rows)
    return {name: (got[name], want[name]) for name in got}


@cache
def _routers() -> list[HashedRouter]:
    """Make planned routers of two layers."""
    text = np.random.default_rng(0).integers(0, VOCAB, 4000).astype(np.uint8)
    return [HashedRouter(t) for t in build_tables(_moe(), VOCAB, text, num_tables=2, seed=1, cache_dir=None)]


def _plan(number: int, device: torch.device | str) -> Plan:
    """Plan 64 tokens of random ids, on the device."""
    ids = torch.randint(0, VOCAB, (1, 4, 16), generator=torch.Generator().manual_seed(number))
    return _copy(_routers()[0].plan(GroupTokens(ids, ids[..., :1]), 2), device)


def _moe() -> MoEConfig:
    return MoEConfig(experts=8, expert_width=32, ngram=2, rows=128)


def _copy(plan: Plan, device: torch.device | str) -> Plan:
    """Copy a plan to memory of its own."""
    copied: Plan = map_tensors(lambda tensor: tensor.to(device, copy=True), plan)
    return copied


def _layer(device: str) -> tuple[MoELayer, Tensor, Plan]:
    torch.manual_seed(0)
    layer = MoELayer(32, _moe(), KernelsConfig(backend=Backend.triton, masked_from_k=99), 0, dropout=0.1).to(device)
    return layer, torch.randn(64, 32, device=device, requires_grad=True), _plan(0, device)


def _call(plan: Plan) -> Routing:
    tokens = torch.arange(64, device=plan.count_E.device)
    return Routing(2, (plan,), tokens, layer_seeds(3, 1).to(tokens.device))


def _gradients(layer: MoELayer, x_TD: Tensor, call: Routing) -> tuple[Tensor, ...]:
    y_TD = layer(x_TD, call).y_TD
    return y_TD.detach(), *torch.autograd.grad(y_TD, [x_TD, *layer.experts.parameters()], torch.ones_like(y_TD))


def _captured(run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """Capture run() as a CUDA graph; return a function that replays it and returns its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = run()

    def replay() -> tuple[Tensor, ...]:
        captured.replay()
        return results

    return replay


@contextmanager
def _no_reads(dry_run: bool) -> Iterator[None]:
    if dry_run:
        with ReadBacks(refuse=True):
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _train(device: str, backend: Backend, steps: int) -> list[float]:
    """Return the losses of a model of two layers over steps of random text with a pattern."""
    config = Config(
        data=DataConfig(streams=4, segment=16),
        model=ModelConfig(layers=2, width=32, heads=2, head_width=16, memory=0, dropout=0.0, attention_dropout=0.0),
        moe=_moe(),
        schedule=ScheduleConfig(k_min=2, k_max=2),
        eval=EvalConfig(k=[2]),
        kernels=KernelsConfig(backend=backend, masked_from_k=99),
    )
    model = build_model(config, VOCAB).to(device)
    adam = torch.optim.Adam(model.parameters(), 3e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        first = torch.randint(0, VOCAB, (4, 1), generator=generator)
        ids = (first + 5 * torch.arange(17)) % VOCAB
        plans = tuple(
            _copy(router.plan(GroupTokens(ids[None, :, :-1], ids[None, :, :1]), 2), device) for router in _routers()
        )
        out = model(ids[:, :-1].to(device), ids[:, 1:].to(device), None, Routing(2, plans))
        adam.zero_grad()
        out.loss.backward()
        adam.step()
        losses.append(out.loss.item())
    return losses
