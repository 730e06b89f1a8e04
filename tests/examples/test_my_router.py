"""The first examples against plain loops, on ranks, and from the command line."""

import pytest
import torch

from examples.routers.my_live_router import MyLiveRouter
from examples.routers.my_router import MyRouter
from foreroute.engine.config import MoEConfig
from foreroute.engine.routing.planned_router import RouterInputs
from foreroute.engine.testing.routers import route_of
from tests.examples.on_ranks import assert_two_ranks_train_like_one
from tests.launch.conftest import loggers, run  # noqa: F401  (fixtures)


def test_the_planned_router():
    first, second = MyRouter.build(MoEConfig(experts=4), RouterInputs(11, 0, 2))
    ids_BQ = torch.tensor([[0, 3, 10], [7, 7, 2]])
    for router in (first, second):
        route = route_of(router, ids_BQ, torch.zeros(2, 3, dtype=torch.int64), 3)
        assert route.expert_TK.tolist() == [[(i + j) % 4 for j in range(3)] for i in ids_BQ.flatten().tolist()]
        assert torch.equal(route.weight_TK, torch.full((6, 3), 1 / 3))


def test_the_live_router():
    torch.manual_seed(0)
    router, x_TD = MyLiveRouter(5, MoEConfig(experts=4), 0).double(), torch.randn(6, 5, dtype=torch.float64)
    route = router(x_TD, 2).route
    for x_D, experts, weights in zip(x_TD, route.expert_TK.tolist(), route.weight_TK.tolist(), strict=True):
        logits = [float(router.gate[e].detach() @ x_D) for e in range(4)]
        assert experts == sorted(range(4), key=lambda e: -logits[e])[:2]
        assert weights == pytest.approx([1 / (1 + torch.e ** -logits[e]) for e in experts])


@pytest.mark.dist
@pytest.mark.parametrize("router", ["my_router:MyRouter", "my_live_router:MyLiveRouter"])
def test_two_ranks_train_like_one(router):
    assert_two_ranks_train_like_one(router)


@pytest.mark.parametrize("router", ["my_router:MyRouter", "read_me:NetworkRouter"])
def test_a_run_from_the_command_line_is_as_certified(run, tmp_path, router):  # noqa: F811
    options = "experiment=debug", "train.steps=10", f"moe.router=examples.routers.{router}"
    done = run("certify", *options, "world_size=1", f"out={tmp_path / 'certificate'}")
    assert done.returncode == 0, done.stderr
    evaluation = "eval.max_symbols=500", "eval.k=[1,4]"
    done = run("train", *options, *evaluation, f"train.runs_dir={tmp_path}", f"certificate={tmp_path / 'certificate'}")
    assert done.returncode == 0, done.stderr
    assert "10 steps were as certified" in done.stdout + done.stderr
    assert (tmp_path / "debug" / "summary.json").exists()
