"""Checkpoints of a training run on gloo ranks: saved on one topology, continued on others by fresh processes."""

from types import SimpleNamespace

import numpy as np
import pytest

from foreroute.engine.config import Precision
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.tiny_run import Run

HALF = {"precision": Precision.bf16, "dropout": 0.1}
GATES = {"moe": {"weights": "live", "constant_experts": 1, "copy_experts": 1, "shared_width": 6, "residual": True}}
SAVED = {  # folder: world, expert ranks, ZeRO stage, options
    "ranks4-experts2-zero1": (4, 2, 1, {}),
    "ranks4-experts2-zero3": (4, 2, 3, {}),
    "half-precision": (4, 2, 3, HALF),
    "gates": (4, 2, 3, GATES),
}
CONTINUED = [  # folder, world, expert ranks, ZeRO stage, options
    ("ranks4-experts2-zero1", 4, 2, 1, {}),  # the same topology: bit for bit
    ("half-precision", 4, 2, 3, HALF),
    ("gates", 4, 2, 3, GATES),
    ("gates", 2, 2, 1, GATES),
    ("gates", 1, 1, 2, GATES),
    ("ranks4-experts2-zero1", 4, 4, 1, {}),
    ("ranks4-experts2-zero1", 4, 2, 3, {}),
    ("ranks4-experts2-zero1", 2, 2, 2, {}),
    ("ranks4-experts2-zero1", 2, 1, 1, {"accumulation": 2}),
    ("ranks4-experts2-zero3", 2, 2, 0, {}),
    ("ranks4-experts2-zero3", 2, 1, 3, {"whole": 500}),
    ("ranks4-experts2-zero1", 1, 1, 1, {}),
    ("ranks4-experts2-zero3", 1, 1, 2, {}),
    *(
        ("ranks4-experts2-zero1", 1, 1, 1, {"forget": what})
        for what in ("weight", "exp_avg", "exp_avg_sq", "adam_step", "memory")
    ),
]


def save_and_go_on(rank, ranks, folder):
    """Four steps, a checkpoint, five more steps, of each run of SAVED."""
    results = {}
    for name, (_, expert_ranks, stage, options) in SAVED.items():
        run = Run(Mesh(rank, ranks, expert_ranks), stage, **options)
        for _ in range(4):
            run.step()
        run.save(folder / name)
        saved = run.state()
        results[name] = SimpleNamespace(saved=saved, losses=[run.step() for _ in range(5)], state=run.state())
    return results


def go_on(rank, ranks, folder, cases):
    """Load and make five more steps; `forget` leaves out something that was loaded."""
    results = []
    for name, _, expert_ranks, stage, options in cases:
        forget = options.pop("forget", None)
        run = Run(Mesh(rank, ranks, expert_ranks), stage, **options)
        fresh = dict(run.engine.read_state()) if forget else {}
        rng = run.load(folder / name).rng
        result = SimpleNamespace(saved=run.state(), has_rng=rng is not None)
        if forget == "adam_step":
            run.engine.set_adam_step(0)
        elif forget == "memory":
            run.memory = [None]
        elif forget is not None:
            for key, values in list(run.engine.read_state()):
                run.engine.write_state(key, {**values, forget: fresh[key][forget]})
        result.losses, result.state = [run.step() for _ in range(5)], run.state()
        results.append(result)
    return results


def compare_continued(got, want):
    assert got.losses == pytest.approx(want.losses, rel=1e-5)
    for name, value in got.state.items():
        error = np.linalg.norm(value - want.state[name]) / np.linalg.norm(want.state[name])
        assert error < 1e-4, name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of checkpoints, and for each the state when it was saved and what came after it without a break."""
    folder = tmp_path_factory.mktemp("topologies")
    answers = run_ranks(save_and_go_on, 4, 4, folder)
    wanted = {}
    for name in SAVED:
        parts = [answer[name] for answer in answers]
        whole = [{k: v for part in parts for k, v in getattr(part, what).items()} for what in ("saved", "state")]
        wanted[name] = SimpleNamespace(saved=whole[0], losses=parts[0].losses, state=whole[1])
    return folder, wanted


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_anywhere(ranks, saved):
    folder, wanted = saved
    cases = [case for case in CONTINUED if case[1] == ranks]
    answers = run_ranks(go_on, ranks, ranks, folder, cases)
    for index, (name, *topology, options) in enumerate(cases):
        want = wanted[name]
        for got in [answer[index] for answer in answers]:
            assert all(np.array_equal(value, want.saved[key]) for key, value in got.saved.items())
            assert got.has_rng == (topology[:2] == [4, 2])
            if "forget" in options:  # negative control
                with pytest.raises(AssertionError):
                    compare_continued(got, want)
                    pytest.fail(f"{options} changes nothing")
            elif topology == list(SAVED[name][:3]):
                assert got.losses == want.losses, name
                assert all(np.array_equal(value, want.state[key]) for key, value in got.state.items())
            else:
                compare_continued(got, want)
        assert {key for answer in answers for key in answer[index].state} == set(want.state)
