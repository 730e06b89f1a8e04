"""Bytes of tensors while a rank trains, counted by PyTorch's allocator: the reference for
engine/certificate/memory/peak.py.

`TensorBytes` counts every block that PyTorch allocates on the CPU inside its context, also inside operators
(engine/profiling/tensor_bytes.py). It does not count numpy arrays, so plans are counted when they are made.

The profiler does not see frees by threads that it does not profile, such as gloo's. So the last reference to sent rows
must be ours: inside the context every wait for a collective takes a little longer (`_GLOO_S`), until gloo's thread has
released them. If that is not enough, the block counts as freed when its address is allocated again. PyTorch's own total
would count it for ever.
"""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.data.loader import PlannedLoader
from foreroute.engine.data.planned_batches import TrainingBatches
from foreroute.engine.metrics.step_meter import StepMeter
from foreroute.engine.model.build import build_model
from foreroute.engine.model.transformer_xl import Memory
from foreroute.engine.optim import deepspeed_engine as adapter
from foreroute.engine.parallel.cpu_group import CpuGroup, GlooGroup
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.world import World
from foreroute.engine.profiling.tensor_bytes import CountedBatches, PlanBytes, blocks, peaks
from foreroute.engine.routing.planned.hashed import HashedRouter
from foreroute.engine.train.step import train_step

_MARK = "foreroute: counted"
_GLOO_S = 0.005


class TensorBytes:
    """Counts allocated bytes in a `with` block; `peak_bytes` is set after it."""

    peak_bytes: int
    """The largest number of bytes inside marked() that were allocated in the block and not yet freed."""

    def __init__(self) -> None:
        self._slow_wait = slow_waits()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "TensorBytes":
        gc.collect()
        gc.freeze()  # present objects are not freed in the block
        self._slow_wait.__enter__()
        self._profile.__enter__()
        return self

    def marked(self) -> record_function:
        """Mark a section of the block as one in which the peak is measured."""
        return record_function(_MARK)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)
        self._slow_wait.__exit__(None, None, None)
        gc.unfreeze()
        if error is None:
            self.peak_bytes = peaks(blocks(self._profile, [_MARK])).get(_MARK, 0)


def slow_waits(seconds: float = _GLOO_S) -> AbstractContextManager[Any]:
    """Make every wait for a collective so much longer, in the block."""
    return mock.patch.object(dist.Work, "wait", _slowly(dist.Work.wait, seconds))


def _slowly(wait: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*arguments: Any, **options: Any) -> Any:
        found = wait(*arguments, **options)
        time.sleep(seconds)
        return found

    return slow


def train(
    layout: Layout,
    rank: int,
    ids: NDArray[np.uint8],
    routers: Sequence[HashedRouter],
    vocab_size: int,
    *,
    counted: bool = True,
) -> int:
    """Train train.steps steps as one rank of the run, in the present process group.

    Returns:
        The largest number of bytes of tensors and plans held in a step; 0 unless counted.
    """
    plans, held = PlanBytes(), TensorBytes()
    config, mesh = layout.config, Mesh(rank, layout.placement.world_size, layout.placement.expert_ranks)
    with held if counted else nullcontext():
        model = build_model(config, vocab_size)
        engine = adapter.start(model, config, mesh)
        batches = TrainingBatches(
            config,
            layout.read(ids),
            mesh,
            [router.place(mesh) for router in routers],
            table_keys=model.table_keys,
            planning=CpuGroup() if mesh.world == 1 else GlooGroup(dist.new_group()),
        )
        loader = PlannedLoader(
            CountedBatches(batches, plans),
            steps=range(config.train.steps),
            accumulation=config.train.accumulation,
            prefetch=config.data.prefetch,
        )
        world = World(mesh) if mesh.world == 1 else World(mesh, cpu_group=GlooGroup(dist.group.WORLD))  # type: ignore[arg-type]
        memory: list[Memory | None] = [None] * config.train.accumulation
        meter = StepMeter(engine.module, engine.device, engine.comm, world)
        for step in range(config.train.steps):
            with held.marked():
                train_step(
                    engine, loader, memory, train=config.train, optim=config.optim, step=step, meter=meter
                ).read()
        loader.close()
    return held.peak_bytes + plans.peak_bytes if counted else 0
