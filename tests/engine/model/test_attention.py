"""engine.model.attention: encoded distances against loops, the projections against the plain-loop attention."""

import math

import pytest
import torch

from foreroute.engine.config import ModelConfig
from foreroute.engine.model.attention import RelativeAttention, SharedAttention, encode_distances
from foreroute.kernels.ops.relative_attention import relative_attention_reference


@pytest.mark.parametrize("clamp_len", [0, 3])
def test_encode_distances(clamp_len):
    got = encode_distances(6, 8, clamp_len=clamp_len, like=torch.zeros(1))
    for distance in range(6):
        d = min(distance, clamp_len) if clamp_len else distance
        for i in range(4):
            angle = d / 10000 ** (2 * i / 8)
            assert got[distance, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert got[distance, 4 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_equals_projections_around_reference(window):
    torch.manual_seed(0)
    model = ModelConfig(width=6, heads=2, head_width=4)
    attention = RelativeAttention(model).double()
    context = torch.randn(2, 9, 6, dtype=torch.float64)
    distance = torch.randn(9, 6, dtype=torch.float64)
    u, v = torch.randn(2, 2, 4, dtype=torch.float64)
    got = attention(context[:, 4:], context, SharedAttention(distance, u, v, window))
    key, value = attention.key_value.weight.chunk(2)
    want = relative_attention_reference(
        (context[:, 4:] @ attention.query.weight.T).view(2, 5, 2, 4),
        (context @ key.T).view(2, 9, 2, 4),
        (context @ value.T).view(2, 9, 2, 4),
        (distance @ attention.distance.weight.T).view(9, 2, 4),
        u,
        v,
        scale=0.5,
        window=window,
    )
    assert torch.allclose(got, want.reshape(2, 5, 8) @ attention.output.weight.T, atol=1e-12)


def test_attention_dropout_only_in_training():
    torch.manual_seed(0)
    attention = RelativeAttention(ModelConfig(width=6, heads=2, head_width=4, attention_dropout=0.5))
    context, distance = torch.randn(1, 9, 6), torch.randn(9, 6)
    shared = SharedAttention(distance, torch.zeros(2, 4), torch.zeros(2, 4), None)
    train = [attention(context, context, shared) for _ in range(2)]
    attention.eval()
    evaluate = [attention(context, context, shared) for _ in range(2)]
    assert not torch.equal(*train)
    assert torch.equal(*evaluate)
