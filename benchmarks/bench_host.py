"""Host time of a layer, an attention and an optimizer step: what Python and PyTorch need to launch the work.

    python -m benchmarks.bench_host [--rounds N]

A model whose kernels are shorter than this waits for its host. Tensors are tiny and lie on the CPU, so operations of
PyTorch take little more than their dispatch; Triton kernels are prepared and not launched (kernels.launching.recording
with run=False), so the time of Triton's own launcher is missing: that of `launches` kernels. Fastest rounds of each
case, in turn; a case is forward and backward, gradients of parameters included. Letters: T tokens.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial

SHAPE = {"layers": 16, "tokens": 64, "width": 32, "experts": 16, "k": 4}
CALLS = 20  # of a case in each round


def main() -> None:
    """Measure and print."""
    os.environ["TRITON_INTERPRET"] = "1"  # lets "triton" take tensors on the CPU; read when Triton is imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from benchmarks.harness import environment, interleave, minima_ms, positive, print_result, print_table
    from benchmarks.harness.against import parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=20, help="default 20")
    args = parse(parser)
    import torch

    from foreroute.kernels.launching import recording
    from foreroute.launch.start.process import keep_freed_memory

    keep_freed_memory()  # as every program of launch/ does
    torch.set_num_threads(1)
    layer, attention = layer_case(), attention_case()
    cases: dict[str, Callable[[], object]] = {
        "layer": partial(repeat, layer),
        "attention": partial(repeat, attention),
        "step": step_case(),
    }
    with recording(run=False) as recorder:
        layer()
        launches = len(recorder.launches)
    with recording(run=False) as recorder:
        seconds = interleave(cases, args.rounds, warmup=2)
    ms = minima_ms(seconds)
    ms |= {name: ms[name] / CALLS for name in ("layer", "attention")}
    print_table(["case", "ms"], list(ms.items()))
    figures = {f"{name}_ms": value for name, value in ms.items()}
    print_result({**figures, "launches": launches, **SHAPE, **environment()})


def repeat(case: Callable[[], object]) -> None:
    """Call a case so often that the clock's own time does not matter."""
    for _ in range(CALLS):
        case()


def layer_case() -> Callable[[], object]:
    """Make the case of an expert layer with a planned router, with dropout."""
    import torch

    from foreroute.engine.config import KernelsConfig, MoEConfig
    from foreroute.engine.config.enums import Backend
    from foreroute.engine.moe.layer import MoELayer
    from foreroute.engine.routing.plan import Route, Routing, build_plan, layer_seeds

    tokens, width, experts, k = (SHAPE[name] for name in ("tokens", "width", "experts", "k"))
    moe = MoEConfig(experts=experts, expert_width=width)
    layer = MoELayer(width, moe, KernelsConfig(backend=Backend.triton), 0, dropout=0.1)
    expert_TK = torch.rand(tokens, experts).argsort(dim=1)[:, :k]
    plan = build_plan(Route(expert_TK, torch.full((tokens, k), 1 / k)), experts)
    routing = Routing(k, (plan,), torch.arange(tokens), layer_seeds(1, 1))
    x_TD = torch.randn(tokens, width, requires_grad=True)
    cotangent_TD, leaves = torch.ones_like(x_TD), [x_TD, *layer.parameters()]

    def run() -> None:
        torch.autograd.grad(layer(x_TD, routing).y_TD, leaves, cotangent_TD)

    return run


def attention_case() -> Callable[[], object]:
    """Make the case of a block's attention."""
    import torch

    from foreroute.engine.config import ModelConfig
    from foreroute.engine.model.attention import RelativeAttention, SharedAttention

    width = SHAPE["width"]
    attention = RelativeAttention(ModelConfig(width=width, heads=2, head_width=16, attention_dropout=0.0))
    x_BQD = torch.randn(2, 8, width, requires_grad=True)
    u_HW = torch.zeros(2, 16, requires_grad=True)
    shared = SharedAttention(torch.randn(16, width), u_HW, u_HW, None)
    context_BSD = torch.cat((torch.randn(2, 8, width), x_BQD.detach()), dim=1).requires_grad_()
    cotangent_BQD, leaves = torch.ones_like(x_BQD), [x_BQD, context_BSD, u_HW, *attention.parameters()]

    def run() -> None:
        torch.autograd.grad(attention(x_BQD, context_BSD, shared), leaves, cotangent_BQD)

    return run


def step_case() -> Callable[[], object]:
    """Make the case of the update of all weights through DeepSpeed, clipped."""
    import torch

    from foreroute.engine.config import Config, KernelsConfig, ModelConfig, MoEConfig
    from foreroute.engine.config.enums import Backend
    from foreroute.engine.model.build import build_model
    from foreroute.engine.optim.deepspeed_engine import start
    from foreroute.engine.parallel.world import World

    config = Config(
        model=ModelConfig(layers=SHAPE["layers"], width=SHAPE["width"], heads=2, head_width=16),
        moe=MoEConfig(experts=SHAPE["experts"], expert_width=SHAPE["width"]),
        kernels=KernelsConfig(backend=Backend.cpu, masked_from_k=99),
    )
    engine = start(build_model(config, 64), config, World().mesh)
    parameters = list(engine.module.parameters())

    def run() -> None:
        loss = torch.stack([p.sum() for p in parameters]).sum()
        engine.backward(loss)
        engine.step()

    return run


if __name__ == "__main__":
    main()
