"""Relative attention, forward and backward, against plain scaled_dot_product_attention of the same shapes.

The plain one has no distance term (two thirds of the products) and gets the causal mask with memory. Last line: JSON,
ratio = fastest relative round / fastest plain round, for each precision.

    python -m benchmarks.bench_attention [--streams 4] [--segment 512] [--memory 512] [--threads 2] [--rounds 15]
"""

import argparse

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, environment, interleave, minima_ms, print_result, print_table
from benchmarks.harness.against import parse
from foreroute.kernels.ops.relative_attention import relative_attention
from foreroute.launch.start.process import keep_freed_memory

HEADS, WIDTH = 8, 64
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases(streams: int, segment: int, memory: int, dtype: torch.dtype) -> dict[str, Case]:
    keys = memory + segment

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, HEADS, WIDTH, dtype=dtype, requires_grad=True)

    query, key, value = leaf(streams, segment), leaf(streams, keys), leaf(streams, keys)
    inputs = [query, key, value, leaf(keys), leaf(), leaf()]
    by_head = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs[:3]]
    d_out = torch.randn_like(query)
    d_out_by_head = d_out.transpose(1, 2).contiguous()
    visible = torch.arange(segment)[:, None] + memory >= torch.arange(keys)

    def relative() -> None:
        out = relative_attention(*inputs, scale=WIDTH**-0.5)
        torch.autograd.grad(out, inputs, d_out)

    def plain() -> None:
        out = F.scaled_dot_product_attention(by_head[0], by_head[1], by_head[2], attn_mask=visible)
        torch.autograd.grad(out, by_head, d_out_by_head)

    return {"relative": relative, "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--segment", type=int, default=512)
    parser.add_argument("--memory", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    args = parse(parser)
    keep_freed_memory()  # as every program of launch/ does
    torch.set_num_threads(args.threads)
    rows, ratio = [], {}
    for name, dtype in PRECISIONS.items():
        best = minima_ms(interleave(cases(args.streams, args.segment, args.memory, dtype), args.rounds, 2))
        ratio[name] = best["relative"] / best["plain"]
        rows.append((name, best["relative"], best["plain"], ratio[name]))
    print_table(("precision", "relative_ms", "plain_ms", "ratio"), rows)
    print_result({"ratio": ratio, "shape": vars(args), "environment": environment()})


if __name__ == "__main__":
    main()
