"""What the sections of the model refuse."""

import pytest

from foreroute.engine.config import Config, ModelConfig, MoEConfig
from foreroute.engine.errors import UserError
from foreroute.engine.routing.methods import method_of


@pytest.mark.parametrize("value", ["hashd", "Frozen", "", None, 3, True])
def test_what_is_no_router_is_one_line(value):
    with pytest.raises(UserError) as error:
        MoEConfig(router=value)
    text = str(error.value)
    assert text.startswith(f"moe.router={value}: must be one of ") and "frozen" in text and "\n" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pack": 4, "builder": "packed", "copy_experts": 1}, "moe.pack=4: takes no constant, copy or null experts"),
        ({"experts": 500, "null_experts": 13}, "moe: has 513 experts of all kinds, at most 512"),
        ({"residual": True}, "moe.residual=true: needs a shared expert, moe.shared_width"),
        ({"gate_scale": 0.0}, "moe.gate_scale=0.0: must be above 0"),
        ({"router": "dense", "copy_experts": 1}, "moe.router=dense: takes no constant, copy or null experts"),
    ],
)
def test_what_does_not_go_together_is_one_line(options, words):
    with pytest.raises(UserError) as error:
        MoEConfig(**options)
    assert str(error.value).startswith(words)


@pytest.mark.parametrize("router", ["frozen", "learned", "fresh", "stochastic", "dense"])
def test_a_router_without_keys_has_none_to_shuffle(router):
    with pytest.raises(UserError, match=rf"^moe\.keys=shuffled: must be own with moe\.router={router}, "):
        method_of(MoEConfig(router=router, keys="shuffled"))


def test_signatures_need_fixed_weights():
    with pytest.raises(UserError, match=r"^model\.signatures=true: needs fixed weights, moe\.weights is live"):
        Config(model=ModelConfig(signatures=True), moe=MoEConfig(router="dense", weights="live"))
