"""N-gram tables through DeepSpeed at every ZeRO stage: 2 and 4 ranks train like one, with Adam and with clipping."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.testing.ranks import run_ranks
from foreroute.engine.testing.tiny_run import Run

TABLES = {"rows": 30, "heads": 2, "width": 3, "layers": [1], "lr_factor": 2.0}
STEPS, CLIP = 5, 0.1
Setting = tuple[int, int]  # stage of ZeRO, micro-batches of a step


def train(rank: int, ranks: int, settings: Sequence[Setting], tables: dict[str, Any]) -> list[Any]:
    """Return for each setting the losses, norms, rows and weights of this rank."""
    found = []
    for stage, accumulation in settings:
        mesh = Mesh(rank, ranks, 1)
        run = Run(mesh, stage, clip=CLIP, tables=tables, accumulation=accumulation)
        losses, norms = [], []
        for _ in range(STEPS):
            losses.append(run.step())
            norms.append(run.engine.grad_norm.item())
        found.append((losses, norms, run.rows(), run.state()))
    return found


def on_ranks(ranks: int, settings: Sequence[Setting], tables: dict[str, Any] = TABLES) -> list[Any]:
    """Join the ranks' answers for each setting: losses, norms, rows, weights."""
    joined = []
    for parts in zip(*run_ranks(train, ranks, ranks, settings, tables), strict=True):
        losses, norms, _, weights = parts[0]
        joined.append((losses, norms, {place: row for part in parts for place, row in part[2].items()}, weights))
    return joined


def error(got: Any, want: Any) -> dict[str, float]:
    """Relative errors of losses, norms, rows and the worst weight or moment."""
    assert got[2].keys() == want[2].keys() and got[3].keys() == want[3].keys()
    rows = [np.stack([found[2][place] for place in sorted(want[2])]) for found in (got, want)]
    weights = [name for name in want[3] if name.startswith("weight/")]
    relative = lambda a, b: float(np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b))  # noqa: E731
    return {
        "losses": relative(got[0], want[0]),
        "norms": relative(got[1], want[1]),
        "rows": relative(*rows),
        "weights": max(relative(got[3][name], want[3][name]) for name in weights),
    }


def check(ranks: int, settings: Sequence[Setting]) -> None:
    (want,) = on_ranks(1, [(1, 1)])
    assert min(want[1]) > CLIP  # gradients are clipped
    for setting, got in zip(settings, on_ranks(ranks, settings), strict=True):
        found = error(got, want)
        assert found["losses"] < 1e-6 and found["norms"] < 1e-5 and max(found.values()) < 1e-4, (setting, found)
    # negative control: without the factor of the learning rate rows end elsewhere
    (other,) = on_ranks(1, [(1, 1)], {**TABLES, "lr_factor": 1.9})
    assert error(other, want)["rows"] > 1e-4


@pytest.mark.dist
def test_two_ranks_train_like_one():
    check(2, [(1, 1), (3, 2)])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_stage_trains_like_one_rank(ranks):
    check(ranks, [(1, 1), (2, 4 // ranks), (3, 1)])
