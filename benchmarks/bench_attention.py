"""Relative attention, forward and backward, against plain scaled_dot_product_attention of the same shapes.

The plain one has no distance term (two thirds of the products) and gets the causal mask with memory. A third case is
relative attention that stops at documents. Last line: JSON, ratio = fastest relative round / fastest plain round,
documents = fastest round that stops at documents / fastest relative round, for each precision.

    python -m benchmarks.bench_attention [--streams 4] [--segment 512] [--memory 512] [--document 200] [--threads 2]
        [--rounds 15]
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


def cases(streams: int, segment: int, memory: int, document: int, dtype: torch.dtype) -> dict[str, Case]:
    keys = memory + segment

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, HEADS, WIDTH, dtype=dtype, requires_grad=True)

    query, key, value = leaf(streams, segment), leaf(streams, keys), leaf(streams, keys)
    inputs = [query, key, value, leaf(keys), leaf(), leaf()]
    by_head = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs[:3]]
    d_out = torch.randn_like(query)
    d_out_by_head = d_out.transpose(1, 2).contiguous()
    visible = torch.arange(segment)[:, None] + memory >= torch.arange(keys)

    own_Q = torch.arange(memory, keys, dtype=torch.int32)
    first_BQ = (own_Q - own_Q % document).expand(streams, -1)

    def relative(first_BQ: torch.Tensor | None = None) -> None:
        out = relative_attention(*inputs, scale=WIDTH**-0.5, first_BQ=first_BQ)
        torch.autograd.grad(out, inputs, d_out)

    def plain() -> None:
        out = F.scaled_dot_product_attention(by_head[0], by_head[1], by_head[2], attn_mask=visible)
        torch.autograd.grad(out, by_head, d_out_by_head)

    return {"relative": relative, "documents": lambda: relative(first_BQ), "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--segment", type=int, default=512)
    parser.add_argument("--memory", type=int, default=512)
    parser.add_argument("--document", type=int, default=200, help="ids of each document")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    args = parse(parser)
    keep_freed_memory()  # as every program of launch/ does
    torch.set_num_threads(args.threads)
    rows, ratio, documents = [], {}, {}
    for name, dtype in PRECISIONS.items():
        made = cases(args.streams, args.segment, args.memory, args.document, dtype)
        best = minima_ms(interleave(made, args.rounds, 2))
        ratio[name] = best["relative"] / best["plain"]
        documents[name] = best["documents"] / best["relative"]
        rows.append((name, best["relative"], best["plain"], best["documents"], ratio[name], documents[name]))
    print_table(("precision", "relative_ms", "plain_ms", "documents_ms", "ratio", "documents"), rows)
    print_result({"ratio": ratio, "documents": documents, "shape": vars(args), "environment": environment()})


if __name__ == "__main__":
    main()
