"""Which modules may be replaced: kinds of feed-forwards that exist, and modules that hold more than one."""

import warnings

import pytest
import torch
from torch import nn

from foreroute.engine.errors import UserError
from foreroute.engine.plug_in.replaceable import find_feed_forwards

D, F = 8, 20


class Gated(nn.Module):
    """As in Llama, with parts that the names alone do not give away."""

    def __init__(self, fused=False, bias=False):
        super().__init__()
        self.up = nn.Linear(D, 2 * F if fused else F, bias=bias)
        self.gate = None if fused else nn.Linear(D, F, bias=bias)
        self.down = nn.Linear(F, D, bias=bias)


class Transposed(nn.Module):
    """As in GPT-2: matrices the other way round, on the module itself."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.zeros(D, F)), nn.Parameter(torch.zeros(F, D))
        self.b1, self.b2 = nn.Parameter(torch.zeros(F)), nn.Parameter(torch.zeros(D))


def plain(*behind, inner=()):
    return nn.Sequential(nn.Linear(D, F), nn.ReLU(), *inner, nn.Linear(F, D), *behind)


def quantized(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch is about to remove it, and users still have it
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear})


def found(module, pattern="it"):
    model = nn.ModuleDict({"embed": nn.Embedding(9, D), "it": module})
    return find_feed_forwards(model, pattern, D)


FEED_FORWARDS = {
    "plain": plain,
    "gated": Gated,
    "gated with biases": lambda: Gated(bias=True),
    "gate and up in one": lambda: Gated(fused=True),
    "transposed": Transposed,
    "wrapped": lambda: nn.Sequential(plain(nn.Dropout(0.1))),
    "of three layers": lambda: plain(inner=(nn.Linear(F, F), nn.ReLU())),
    "with a learned activation": lambda: plain(inner=(nn.PReLU(F),)),
    "as wide as the model": lambda: nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)),
    "of convolutions": lambda: nn.Sequential(nn.Conv1d(D, F, 3), nn.Conv1d(F, D, 1)),
    "in bfloat16": lambda: plain().bfloat16(),
}


@pytest.mark.parametrize("kind", FEED_FORWARDS)
def test_one_feed_forward_fits(kind):
    assert found(FEED_FORWARDS[kind]()) == ["it"]


MORE = {
    "a norm before": (lambda: nn.Sequential(nn.LayerNorm(D), *plain()), ""),
    "a norm between": (lambda: plain(inner=(nn.LayerNorm(F),)), ""),
    "a norm around": (lambda: nn.ModuleDict({"norm": nn.LayerNorm(D), "ff": plain()}), "it.ff"),
    "attention": (lambda: nn.MultiheadAttention(D, 2), ""),
    "a block of PyTorch": (lambda: nn.TransformerEncoderLayer(D, 2, F), ""),
    "recurrence": (lambda: nn.GRU(D, D), ""),
    "a mixing matrix": (lambda: nn.Sequential(nn.Linear(D, D), plain()), "it.1"),
    "a square matrix more": (lambda: nn.Sequential(nn.Linear(D, D), *plain()), ""),
    "two feed-forwards": (lambda: nn.Sequential(plain(), Gated()), "it.0, it.1"),
    "a scale": (lambda: plain(*[nn.ParameterList([torch.zeros(D), torch.ones(D)])]), ""),
    "stacked experts": (lambda: nn.ParameterList([torch.zeros(4, F, D), torch.zeros(4, D, F)]), ""),
    "two hidden widths": (lambda: nn.Sequential(nn.Linear(D, 3 * F), nn.Linear(F, D)), ""),
}


@pytest.mark.parametrize("kind", MORE)
def test_more_than_one_feed_forward_is_refused(kind):
    make, inside = MORE[kind]
    module = make()
    if isinstance(module, nn.ModuleDict):
        module = nn.Sequential(*module.values())
        inside = "it.1"
    with pytest.raises(UserError, match="it holds more than one feed-forward: ") as error:
        found(module)
    assert str(error.value).endswith(f"(inside, {inside} would fit)" if inside else "match feed-forwards only")
    if inside:
        names = found(module, rf"{inside.split(', ')[0]}")
        assert names == inside.split(", ")[:1]


@pytest.mark.parametrize(
    "module, fault",
    [
        (plain().to("meta"), "it is on the meta device, where first weights are never drawn"),
        (plain().to(torch.float8_e4m3fn), "it has weights of torch.float8_e4m3fn: must be float64, float32"),
        (
            nn.ParameterList([nn.Parameter(torch.zeros(F, D, dtype=torch.int8), requires_grad=False)] * 2),
            "it has weights of torch.int8",
        ),
        (quantized(plain()), "it is quantized: must have"),
    ],
)
def test_weights_that_cannot_be_drawn_are_refused(module, fault):
    with pytest.raises(UserError, match=fault):
        found(module)
