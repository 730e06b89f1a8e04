"""Methods by name, and the options of their own."""

from dataclasses import dataclass, replace

import pytest
import torch

from foreroute.engine.config import ModelConfig, MoEConfig, RouteWeights
from foreroute.engine.config.model import router_names
from foreroute.engine.config.option import option
from foreroute.engine.errors import UserError
from foreroute.engine.routing.live.frozen import FrozenRouter
from foreroute.engine.routing.live_router import LiveRouter
from foreroute.engine.routing.method_options import Card, read_options
from foreroute.engine.routing.methods import live_method, method_of, option_uses, planned_method, training_passes
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.routing.planned_router import PlannedRouter

BUILT_IN = [name for name in router_names() if name != "dense"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_method_says_what_it_is(name):
    moe = MoEConfig(router=name)
    method = method_of(moe)
    assert method.__module__.endswith(f".{name}") and issubclass(method, PlannedRouter | LiveRouter)
    assert (planned_method(moe) is method) == issubclass(method, PlannedRouter)
    assert (live_method(moe) is method) == issubclass(method, LiveRouter)
    assert isinstance(method.card, Card) and all(method.card)
    assert all(hasattr(moe, option) for option in method.uses)
    assert option_uses(ModelConfig(), moe) == set(method.uses)
    assert training_passes(ModelConfig(), moe) == getattr(method, "passes", 1)


def test_dense_has_no_method():
    moe = MoEConfig(router="dense")
    assert method_of(moe) is planned_method(moe) is live_method(moe) is None
    assert option_uses(ModelConfig(), moe) == set() and training_passes(ModelConfig(), moe) == 1


def test_there_are_planned_and_live_methods_and_one_with_two_passes():
    assert planned_method(MoEConfig()) is HashedRouter and live_method(MoEConfig(router="frozen")) is FrozenRouter
    assert training_passes(ModelConfig(), MoEConfig(router="stochastic")) == 2


def test_a_class_of_the_users():
    moe = MoEConfig(router=f"{FrozenRouter.__module__}:FrozenRouter")
    assert live_method(moe) is FrozenRouter and planned_method(moe) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("foreroute.nothing:Router", "cannot be imported"),
        ("foreroute.engine.errors:Nothing", "cannot be imported"),
        (":Router", "cannot be imported"),
        ("foreroute.engine.errors:require", "must be a class derived from PlannedRouter or LiveRouter"),
        ("foreroute.engine.config:MoEConfig", "must be a class derived from PlannedRouter or LiveRouter"),
    ],
)
def test_what_is_no_router_is_refused(name, message):
    with pytest.raises(UserError, match=rf"moe\.router={name}: {message}"):
        method_of(MoEConfig(router=name))


@pytest.mark.parametrize("option", ["constant_experts", "copy_experts", "null_experts"])
def test_experts_without_rows_that_a_method_does_not_have_are_refused(option):
    message = rf"moe\.{option}=2: must be 0 with moe\.router=fresh, which has none"
    with pytest.raises(UserError, match=message):
        method_of(MoEConfig(router="fresh", **{option: 2}))
    assert method_of(MoEConfig(**{option: 2})) is HashedRouter
    assert method_of(MoEConfig(weights=RouteWeights.live, **{option: 2})) is HashedRouter


@dataclass(frozen=True)
class Own:
    width: int = option(3, "A width.", at_least=1)
    name: str = option("a", "A name.")


def test_options_of_a_method():
    moe = MoEConfig()
    assert read_options(moe, Own) == Own()
    assert read_options(replace(moe, options={"width": 5}), Own) == Own(width=5)
    with pytest.raises(
        UserError, match=r"moe\.options\.depth: no such option of moe\.router=hashed; it has width, name"
    ):
        read_options(replace(moe, options={"depth": 5}), Own)
    with pytest.raises(UserError, match=r"moe\.options\.width=0: must be"):
        read_options(replace(moe, options={"width": 0}), Own)


def test_a_method_without_options_has_none():
    @dataclass
    class Nothing:
        pass

    with pytest.raises(UserError, match=r"moe\.options\.depth: no such option of moe\.router=hashed; it has none"):
        read_options(MoEConfig(options={"depth": 1}), Nothing)


def test_a_live_router_has_no_loss_and_keeps_its_state_unless_it_says_otherwise():
    router = FrozenRouter(4, MoEConfig(experts=3), 0)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    live = router(torch.randn(5, 4), 2)
    assert router.loss(live, torch.ones(3)) is None and not router.balances
    router.after_step(torch.ones(3, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())
