"""The loss of many symbols in chunks of tokens, forward and backward, against the plain way: time and peak memory.

`plain` computes all logits and their cross-entropy by autograd, `chunks` is kernels/ops/linear_cross_entropy.py, and
`torch` is PyTorch's linear_cross_entropy with options where there is one (2.13 and later); it returns the mean alone.
Peak memory is that of tensors within a call, gradients included, hidden states and weights not. A case whose gradients
differ from those of `plain` is not measured. Last line: JSON, time and peak as ratios to `plain`, by symbols.

    python -m benchmarks.bench_loss [--symbols 256 8192 50000] [--tokens 2048] [--width 256] [--dtype fp32] [--rounds 7]
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, environment, interleave, minima_ms, positive, print_result, print_table
from benchmarks.harness.against import parse
from foreroute.engine.testing.tensor_bytes import TensorBytes
from foreroute.kernels.ops.linear_cross_entropy import linear_cross_entropy
from foreroute.kernels.testing.cases import relative_error
from foreroute.launch.start.process import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
Gradients = Callable[[], tuple[Tensor, ...]]


def ways(symbols: int, tokens: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Gradients]:
    """Return the ways to compute the gradients of one loss."""
    generator = torch.Generator().manual_seed(symbols)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul(0.2).to(device, dtype).requires_grad_()

    hidden, weight, bias = leaves = [drawn(tokens, width), drawn(symbols, width), drawn(symbols)]
    target = torch.randint(symbols, (tokens,), generator=generator).to(device)

    def plain() -> tuple[Tensor, ...]:
        nll = F.cross_entropy(F.linear(hidden, weight, bias).float(), target, reduction="none")
        return torch.autograd.grad(nll.mean(), leaves)

    def chunks() -> tuple[Tensor, ...]:
        return torch.autograd.grad(linear_cross_entropy(hidden, weight, bias, target, scale=1 / tokens).loss, leaves)

    found: dict[str, Gradients] = {"plain": plain, "chunks": chunks}
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is not None:

        def theirs() -> tuple[Tensor, ...]:
            loss = F.linear_cross_entropy(hidden, weight, target, linear_bias=bias, options=options())
            return torch.autograd.grad(loss, leaves)

        found["torch"] = theirs
    return found


def finished(way: Gradients, device: str) -> Case:
    """Return a case that waits for the device."""

    def run() -> None:
        way()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def peak_bytes(way: Gradients, device: str) -> int:
    """Return the most bytes of tensors within a call."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return torch.cuda.max_memory_allocated() - before
    counted = TensorBytes()
    with counted, counted.marked():
        way()
    return counted.peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--symbols", type=positive, nargs="+", default=[256, 8192, 50000])
    parser.add_argument("--tokens", type=positive, default=2048)
    parser.add_argument("--width", type=positive, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=7)
    args = parse(parser)
    keep_freed_memory()  # as every program of launch/ does
    torch.set_num_threads(args.threads)
    rows: list[tuple[object, ...]] = []
    time_ratio: dict[int, dict[str, float]] = {}
    peak_ratio: dict[int, dict[str, float]] = {}
    for symbols in args.symbols:
        found = ways(symbols, args.tokens, args.width, DTYPES[args.dtype], args.device)
        truth = found["plain"]()
        errors = {name: max(map(relative_error, way(), truth)) for name, way in found.items()}
        right = {name: way for name, way in found.items() if errors[name] < TOLERANCE[args.dtype]}
        cases = {name: finished(way, args.device) for name, way in right.items()}
        best = minima_ms(interleave(cases, args.rounds))
        peak = {name: peak_bytes(way, args.device) for name, way in right.items()}
        time_ratio[symbols] = {name: best[name] / best["plain"] for name in right}
        peak_ratio[symbols] = {name: peak[name] / peak["plain"] for name in right}
        for name, error in errors.items():
            numbers = (best[name], peak[name] / 1e6, time_ratio[symbols][name], peak_ratio[symbols][name])
            rows.append((symbols, name, *(numbers if name in right else ("wrong",) * 4), f"{error:.1e}"))
    print_table(("symbols", "way", "ms", "peak_mb", "time", "peak", "error"), rows)
    print_result({"time": time_ratio, "peak": peak_ratio, "shape": vars(args), "environment": environment()})


if __name__ == "__main__":
    main()
