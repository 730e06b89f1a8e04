"""A layer in chunks on one rank, where rows arrive at once: gradients of chunks add up as those of one chunk."""

import pytest
import torch

from foreroute.engine.moe.overlap import ChunkCall, run_in_chunks
from foreroute.engine.routing.plan import Route, build_plan, cut
from foreroute.kernels import ExpertWeights, moe_ffn
from foreroute.kernels.testing.cases import relative_error

TOKENS, WIDTH, HIDDEN, EXPERTS, K, PARTS = 64, 16, 24, 4, 2, 32


class Here:
    """An exchange whose rows are there already."""

    def __init__(self, rows=None):
        self.rows = rows

    def to_experts(self, x_tD, chunk):
        return Here(x_tD)

    to_tokens = to_experts

    def wait(self):
        return self.rows


def problem(dtype):
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16().to(dtype)

    matrix = EXPERTS, HIDDEN, WIDTH
    weights = [normal(*matrix), normal(*matrix[:2]), normal(*matrix), normal(EXPERTS, WIDTH)]
    expert_TK = torch.rand(TOKENS, EXPERTS, generator=generator).topk(K).indices
    route = Route(expert_TK, torch.full((TOKENS, K), 1 / K))
    leaves = [x.requires_grad_() for x in (normal(TOKENS, WIDTH), *weights)]
    return route, leaves, normal(TOKENS, WIDTH)


def run(dtype, chunks, *, live=False, activation="relu"):
    """Output and gradients, of a live router's weights too; one chunk by kernels.moe_ffn."""
    route, leaves, cotangent = problem(dtype)
    asked = [*leaves, route.weight_TK.requires_grad_()] if live else leaves
    weights, wide = ExpertWeights(*leaves[1:]), torch.promote_types(dtype, torch.float32)
    options = {"activation": activation, "dropout": None, "masked": False, "backend": "cpu", "mode": "lean"}
    options |= {"precision": "ieee", "debug": False}
    calls = []
    for span in cut(TOKENS, chunks):
        chunk = build_plan(Route(route.expert_TK[span], route.weight_TK[span]), EXPERTS).chunks[0]
        calls.append(ChunkCall(chunk, chunk.weight_N.to(wide), options))
    if chunks == 1:
        y = moe_ffn(leaves[0], calls[0].weight_N, weights, calls[0].chunk.rows, **options)
    else:
        y = run_in_chunks(leaves[0], calls, weights, Here())
    return [y.detach(), *torch.autograd.grad(y, asked, cotangent)]


def errors(got, want):
    return [relative_error(a, b) for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("chunks", [2, 3, PARTS])
def test_parts_equal_the_whole(chunks, live):
    got, want = run(torch.float64, chunks, live=live), run(torch.float64, 1, live=live)
    assert len(got) == 6 + live and max(errors(got[:6], want[:6])) < 1e-14
    assert max(errors(got[6:], want[6:]), default=0) < 1e-6  # the weights are fp32


def test_parts_have_the_activation_of_the_whole():
    got, want = (run(torch.float64, chunks, activation="gelu") for chunks in (3, 1))
    assert max(errors(got, want)) < 1e-14 < 1e-3 < max(errors(got, run(torch.float64, 1)))


def test_parts_of_bf16_are_added_up_in_fp32():
    whole = run(torch.float64, 1)
    once = max(errors(run(torch.bfloat16, 1), whole))
    assert max(errors(run(torch.bfloat16, PARTS), whole)) < 1.5 * once
