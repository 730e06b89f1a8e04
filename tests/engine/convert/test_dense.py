"""Reading a dense feed-forward from a module: roles by what is computed, and what is refused."""

import pytest
import torch
from torch import nn

from foreroute.engine.config import Activation
from foreroute.engine.convert.dense import as_held, read_dense
from foreroute.engine.errors import UserError


class Own(nn.Module):
    """act(x a + p) b + q with equal widths, all zeros: neither shapes nor values tell the roles apart."""

    def __init__(self, act):
        super().__init__()
        self.b, self.a = (nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
        self.q, self.p = (nn.Parameter(torch.zeros(4)) for _ in range(2))
        self.act = act

    def forward(self, x):
        return self.act(x @ self.a + self.p) @ self.b + self.q


class Gated(nn.Module):
    def __init__(self, gate_bias=0.0):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        nn.init.constant_(self.up.bias, gate_bias)

    def forward(self, x):
        return self.down(torch.relu(self.gate(x)) * self.up(x))


def test_roles_follow_from_the_computation():
    dense = read_dense("mlp", Own(torch.nn.functional.silu), 4)
    assert dense.activation is Activation.silu and dense.turned == {"w1"}
    assert dense.names == {"w1": "a", "w2": "b", "b1": "p", "b2": "q"}


def test_gate_is_told_from_the_other_matrix():
    dense = read_dense("mlp", Gated(), 4)
    assert dense.activation is Activation.reglu and dense.turned == {"w2"}
    assert {role: dense.names[role] for role in ("w1", "w2", "w3", "b1", "b3")} == {
        "w1": "gate.weight",
        "w2": "down.weight",
        "w3": "up.weight",
        "b1": "gate.bias",
        "b3": "up.bias",
    }


def test_weights_go_back_under_their_names():
    module = Own(torch.relu)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    dense = read_dense("mlp", module, 4)
    back = as_held(dense.weights, dense.names, dense.turned)
    assert back.keys() == dict(module.named_parameters()).keys()
    assert all(torch.equal(back[name], p) for name, p in module.named_parameters())


@pytest.mark.parametrize(
    ("module", "fault"),
    [
        (
            Own(torch.tanh),
            "mlp: must compute act.* with act one of relu, silu, gelu, gelu_tanh; Own computes something",
        ),
        (Own(lambda z: z * torch.sigmoid(1.702 * z)), "Own computes something else"),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), "something else"),
        (nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 4)), "something else"),
        (Gated(gate_bias=0.1), "mlp: up.bias is not zero: must be, since experts have no bias of the matrix W3"),
    ],
)
def test_what_experts_cannot_compute_is_refused(module, fault):
    with pytest.raises(UserError, match=fault):
        read_dense("mlp", module, 4)
