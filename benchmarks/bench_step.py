"""Time of a whole training step with experts against the dense model of equal parameters: `python -m
benchmarks.bench_step`.

Published shapes of SMoE-Dropout (4 layers, width 256, 16 experts x 512, segment and memory 512) with 4 streams. All
cases take turns in one process and share attention, optimizer (Adam through DeepSpeed) and text; only the feed-forward
differs. Reported: ratio of the fastest steps; the same for the feed-forward layer alone, forward and backward; the
share of step time outside forward, backward and optimizer.

FLOPs of the step allow 0.50, 0.67, 0.83 and 1.0 at k = 4, 8, 12, 16.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.harness import environment, interleave, minima_ms, print_result, print_table
from benchmarks.harness.against import parse
from foreroute.engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    Precision,
    ScheduleConfig,
    Split,
    TrainConfig,
)
from foreroute.engine.config.model import feed_forward_width
from foreroute.engine.data.corpus import prepare
from foreroute.engine.data.loader import PlannedLoader
from foreroute.engine.data.planned_batches import TrainingBatches, group_batch, plan_batch
from foreroute.engine.data.streams import Streams
from foreroute.engine.metrics.step_meter import StepMeter
from foreroute.engine.metrics.timers import StepTimes
from foreroute.engine.model.build import RunModel, build_model, build_routers
from foreroute.engine.model.transformer_xl import Memory
from foreroute.engine.moe.feed_forward import FeedForward
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.optim.deepspeed_engine import Engine, start
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.parallel.world import World
from foreroute.engine.train.resolve import resolve
from foreroute.engine.train.step import train_step
from foreroute.launch.start.process import keep_freed_memory, leaving_at_once

KS = (2, 4, 8, 12, 16)


def shapes(args: argparse.Namespace) -> Config:
    """Return the configuration of the published model with 4 streams."""
    return resolve(
        Config(
            data=DataConfig(streams=4, segment=512),
            model=ModelConfig(dropout=args.dropout),
            moe=MoEConfig(router="hashed"),
            schedule=ScheduleConfig(k_min=4, k_max=16),
            optim=OptimConfig(),
            train=TrainConfig(steps=10**6, precision=Precision[args.precision]),
            eval=EvalConfig(),
        ),
        World(),
    )


class Arm:
    """One case: a loader at a fixed k in front of an engine that other cases may share."""

    def __init__(self, run: RunModel, engine: Engine, meter: StepMeter, k: int) -> None:
        config, ids = run.config, run.corpus.split(Split.train)
        streams = Streams(ids, config.data.streams, config.data.segment, config.context, config.data.start)
        at_k = replace(config, schedule=replace(config.schedule, k_min=k, k_max=k))
        batches = TrainingBatches(at_k, streams, Mesh(), run.routers)
        self.config, self.engine, self.meter = config, engine, meter
        self.memory: list[Memory | None] = [None]
        self.step = 0
        self.times: list[StepTimes] = []
        self.loader = PlannedLoader(batches, steps=range(10**6), accumulation=1, prefetch=2)

    def __call__(self) -> None:
        """Run one training step."""
        launched = train_step(
            self.engine,
            self.loader,
            self.memory,
            train=self.config.train,
            optim=self.config.optim,
            step=self.step,
            meter=self.meter,
        )
        self.times.append(launched.read().times)
        self.step += 1


def _arms(run: RunModel, ks: Sequence[int]) -> list[Arm]:
    engine = start(run.model, run.config)
    meter = StepMeter(run.model, engine.device)
    return [Arm(run, engine, meter, k) for k in ks]


def layer_cases(run: RunModel) -> dict[str, Callable[[], object]]:
    """Make the cases of the feed-forward part alone, forward and backward, at each k and dense."""
    config, corpus = run.config, run.corpus
    torch.manual_seed(0)
    streams = Streams(corpus.split(Split.train), config.data.streams, config.data.segment, config.context)
    batch = streams.batch(0, range(config.data.streams))
    layer = MoELayer(config.model.width, config.moe, config.kernels, 0, dropout=config.model.dropout).train()
    inner = feed_forward_width(config.model, config.moe, 0)
    dense = FeedForward(config.model.width, inner, config.moe.activation, config.model.dropout)
    tokens = batch.ids_BQ.numel()
    dtype = torch.bfloat16 if config.train.precision is Precision.bf16 else torch.float32
    layer, dense = layer.to(dtype), dense.train().to(dtype)
    x_TD = torch.randn(tokens, config.model.width, dtype=dtype).requires_grad_()
    cotangent_TD = torch.randn_like(x_TD)
    cases: dict[str, Callable[[], object]] = {"dense": lambda: dense(x_TD).backward(cotangent_TD)}
    for k in KS:
        routing = plan_batch(group_batch([batch]), k, run.routers, dropout_seed=1, layers=1).routing
        cases[str(k)] = lambda routing=routing: layer(x_TD, routing).y_TD.backward(cotangent_TD)  # type: ignore[misc]
    return cases


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.1, help="the published value by default")
    parser.add_argument("--precision", choices=[p.name for p in Precision], default="fp32")
    args = parse(parser)
    keep_freed_memory()  # as every program of launch/ does
    config = shapes(args)
    corpus = prepare(config.corpus)
    dense_config = replace(config, moe=replace(config.moe, router="dense"))
    dense, run = (
        RunModel(each, corpus, build_model(each, corpus.vocab.size), build_routers(each, corpus))
        for each in (dense_config, config)
    )
    arms = {"dense": _arms(dense, [1])[0]}
    arms.update({str(k): arm for k, arm in zip(KS, _arms(run, KS), strict=True)})
    step_ms = minima_ms(interleave(arms, args.rounds))
    layer_ms = minima_ms(interleave(layer_cases(run), args.rounds))
    times = [time for arm in arms.values() for time in arm.times[1:]]
    outside = sum(time.outside_ms for time in times) / sum(time.step_ms for time in times)
    for arm in arms.values():
        arm.loader.close()
    print(f"{environment()}, {args.precision}, dropout {args.dropout}, masked from k={config.kernels.masked_from_k}")
    print_table(
        ["feed-forward", "step ms", "to dense", "layer ms", "to dense"],
        [
            [
                name if name == "dense" else f"k={name}",
                step_ms[name],
                step_ms[name] / step_ms["dense"],
                layer_ms[name],
                layer_ms[name] / layer_ms["dense"],
            ]
            for name in arms
        ],
    )
    shown = [str(k) for k in KS if k > 2]
    print_result(
        {
            "ratio_to_dense": {k: step_ms[k] / step_ms["dense"] for k in shown},
            "layer_ratio": {k: layer_ms[k] / layer_ms["dense"] for k in shown},
            "dense_ms": step_ms["dense"],
            "outside_fraction": outside,
        }
    )


if __name__ == "__main__":
    with leaving_at_once():
        main()
