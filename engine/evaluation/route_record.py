"""Records the routes of a run with a live router over a split, in the evaluation's own forward passes.

Each token's routes are those of the pass in which it counts (engine/data/streams.py, EvalShares), so they do not depend
on the number of evaluation streams. engine/routing/planned/given.py has the form of the files.

Letters: T tokens of a pass, y expert layers, K experts listed of a token, n tokens of the split.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foreroute.engine.config import Split
from foreroute.engine.data.streams import Batch
from foreroute.engine.errors import require
from foreroute.engine.evaluation.held_out import Evaluation, evaluate
from foreroute.engine.model.build import RunModel
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.parallel.world import World
from foreroute.engine.routing.live_router import LiveRoute
from foreroute.engine.routing.plan import Route
from foreroute.engine.routing.planned.given import NONE, create_routes, finish_routes

Arrays = tuple[NDArray[np.uint16], NDArray[np.float32]]


class _Recorder:
    """Collects what the routers of a model choose, pass by pass."""

    def __init__(self, layers: int, make: Callable[[int, int], Arrays]) -> None:
        self.make, self.arrays = make, None
        self._seen: list[Route | None] = [None] * layers

    arrays: Arrays | None

    def note(self, layer: int, live: LiveRoute) -> None:
        """Keep a router's choice of the running pass."""
        self._seen[layer] = live.route

    def write(self, batch: Batch, counted_BQ: Tensor) -> None:
        """Write the choices of a pass for the positions that count."""
        assert batch.place_B is not None
        place_BQ = batch.place_B.cpu()[:, None] + 1 + torch.arange(counted_BQ.shape[1])
        counted_T = counted_BQ.cpu().flatten()
        row_n = place_BQ.flatten()[counted_T].numpy()
        for layer, route in enumerate(self._seen):
            assert route is not None, "every expert layer runs in a pass"
            expert_nK, weight_nK = in_order(route, counted_T)
            if self.arrays is None:
                self.arrays = self.make(len(self._seen), expert_nK.shape[1])
            experts, weights = self.arrays
            experts[row_n, layer], weights[row_n, layer] = expert_nK, weight_nK


def in_order(route: Route, kept_T: Tensor) -> Arrays:
    """Return the experts and weights of the tokens that are kept, heaviest first, ties by the router's order; NONE and
    0 after a token's last."""
    expert_TK, weight_TK = route.expert_TK.cpu()[kept_T], route.weight_TK.detach().float().cpu()[kept_T]
    used_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    if route.used_TK is not None:
        used_TK = route.used_TK.cpu()[kept_T]
    order_TK = weight_TK.masked_fill(~used_TK, -torch.inf).argsort(dim=1, descending=True, stable=True)
    expert_TK, weight_TK, used_TK = (found.gather(1, order_TK) for found in (expert_TK, weight_TK, used_TK))
    experts = expert_TK.masked_fill(~used_TK, NONE).numpy().astype(np.uint16)
    return experts, weight_TK.masked_fill(~used_TK, 0.0).numpy()


def record(
    run: RunModel,
    split: Split,
    k: int,
    make: Callable[[int, int], Arrays],
    *,
    max_symbols: int = 0,
    progress: Callable[[int, int], None] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Arrays, Evaluation]:
    """Evaluate a split at k experts and collect its routes [n, y, K].

    Args:
        make: makes the arrays for y and K.
        max_symbols: only the first so many of the split; 0 for all.

    Raises:
        UserError: the run has no live router, or experts without rows, which no file has.
    """
    moe = run.config.moe
    layers = [module for module in run.model.modules() if isinstance(module, MoELayer)]
    require(
        bool(layers) and all(layer.router is not None for layer in layers),
        f"moe.router={moe.router}: only a live router, such as learned or frozen, has routes to record",
    )
    require(not moe.by_layer, "moe.by_layer: routes of layers that differ cannot be recorded")
    require(
        moe.columns == moe.experts, "moe: routes to constant, copy and null experts cannot be recorded, only to experts"
    )
    recorder = _Recorder(len(layers), make)
    hooks = []
    for number, layer in enumerate(layers):
        assert layer.router is not None

        def note(_: nn.Module, __: Any, live: LiveRoute, number: int = number) -> None:
            recorder.note(number, live)

        hooks.append(layer.router.register_forward_hook(note))
    try:
        found = evaluate(
            run,
            split=split,
            k=k,
            progress=progress,
            world=World(device=torch.device(device)),
            max_symbols=max_symbols or len(run.corpus.split(split)),
            after_pass=recorder.write,
        )
    finally:
        for hook in hooks:
            hook.remove()
    assert recorder.arrays is not None
    return recorder.arrays, found


def record_to(path: Path, run: RunModel, split: Split, k: int, **options: Any) -> Evaluation:
    """Record the routes of a whole split into files; options of `record`.

    Raises:
        UserError: as `record`, or the files cannot be written.
    """
    ids = run.corpus.split(split)

    def make(layers: int, columns: int) -> Arrays:
        return create_routes(path, (len(ids), layers, columns))

    arrays, found = record(run, split, k, make, **options)
    for array in arrays:
        assert isinstance(array, np.memmap)
        array.flush()
    finish_routes(path, ids, k)
    return found
