"""Lays a replay out as a page: for each place what was measured beside what the certificate predicts."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.time.cluster import ClusterConfig
from foreroute.engine.certificate.time.step_time import StepTime
from foreroute.engine.replay.places import Chosen, Expected
from foreroute.engine.replay.rank import HeldStep, ReplayedStep
from foreroute.launch.page import parts as page
from foreroute.launch.page.parts import KeyFigure, Page, Table
from foreroute.launch.page.words import byte_text
from foreroute.launch.replay.apart import Apart

_LEAD = (
    "One rank of the run at a time, run alone on this machine: its batches, plans, rows, kernels, shards and"
    " allocations are those that it has in the run. The other ranks do not exist; whatever they would send is filled"
    " with numbers of the right size and scale. So sizes, memory and this rank's own time are measured, and losses mean"
    " nothing."
)
_NOT = (
    "Not in it: the network (only modelled, with cluster=NAME), waiting for slower ranks, NCCL's and gloo's own"
    " buffers, links that several ranks use at once, power and clocks of a full machine, and the numbers of training,"
    " such as losses and gradients."
)
_MOMENTS = {"forward": "forward", "backward": "backward", "optimizer": "optimizer step"}
"""Moments that are measured, and what the certificate's names of them begin with."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A place, as it ran and as it was predicted."""

    chosen: Chosen
    steps: list[int]  # 0-based
    apart: Apart
    expected: list[Expected]  # of each step
    modelled: list[StepTime]  # of each step on the cluster; empty without one

    @property
    def as_certified(self) -> bool:
        """Whether every step moved and computed the rows and bytes that were counted."""
        by_step = dict(zip(self.steps, self.expected, strict=True))
        return all(_same(step, by_step[step.step]) for step in self.apart.rank.steps)

    @property
    def fullest(self) -> HeldStep:
        """The step with the most memory."""
        return max(self.apart.rank.held, key=lambda held: held.most)

    @property
    def predicted_bytes(self) -> int:
        """The predicted peak of that step."""
        return self.expected[self.steps.index(self.fullest.step)].memory.peak_bytes

    def plain(self) -> dict[str, Any]:
        """Return every number, for JSON."""
        rank = self.apart.rank
        return {
            "why": self.chosen.why,
            "rank": rank.mesh.rank,
            "device": rank.device,
            "seconds": self.apart.seconds,
            "process_bytes": self.apart.process_bytes,
            "as_certified": self.as_certified,
            "steps": [_plain_step(step) for step in rank.steps],
            "memory": [asdict(held) for held in rank.held],
            "certified": [
                {
                    "step": step + 1,
                    "k": one.k,
                    "received_ym": one.received_ym.tolist(),
                    "computed_ym": one.computed_ym.tolist(),
                    "bytes_y": one.bytes_y.tolist(),
                    **({} if one.tables is None else {name: x.tolist() for name, x in one.tables._asdict().items()}),
                    "memory": asdict(one.memory),
                }
                for step, one in zip(self.steps, self.expected, strict=True)
            ],
            "modelled": [asdict(time) for time in self.modelled],
        }


def _same(step: ReplayedStep, expected: Expected) -> bool:
    rows = step.rows
    pairs = [
        (rows.received_ym, expected.received_ym),
        (rows.computed_ym, expected.computed_ym),
        (rows.bytes_y, expected.bytes_y),
    ]
    if expected.tables is not None:
        pairs += [(getattr(rows, name), certified) for name, certified in expected.tables._asdict().items()]
    return all(np.array_equal(found, certified) for found, certified in pairs)


def _plain_step(step: ReplayedStep) -> dict[str, Any]:
    return {
        "step": step.step + 1,
        "k": step.k,
        "sent_bytes_P": step.sent_bytes_P,
        "times": asdict(step.times),
        "own_ms": step.own_ms,
        "answers_ms": step.answers_ms,
        "cpu_ms": step.cpu_ms,
        **{name: values.tolist() for name, values in step.rows._asdict().items()},
    }


def replay_page(outcomes: Sequence[Outcome], layout: Layout, cluster: ClusterConfig | None) -> Page:
    """Describe a replay."""
    fine = all(one.as_certified for one in outcomes)
    fullest = max(outcomes, key=lambda one: one.fullest.most)
    slowest = max(outcomes, key=_compute_ms)
    error = fullest.fullest.most / fullest.predicted_bytes - 1
    return Page(
        title=f"Replay of {layout.config.train.name}",
        lead=_LEAD,
        verdicts=[
            KeyFigure("Rows and bytes as certified", "yes" if fine else "no", "of every step that was run", good=fine)
        ],
        figures=[
            KeyFigure(
                "Memory at the peak",
                byte_text(fullest.fullest.most),
                f"measured, {_where(fullest)}; {error:+.1%} to the certificate's {byte_text(fullest.predicted_bytes)}",
            ),
            KeyFigure(
                "Own time of a step",
                f"{_compute_ms(slowest):,.1f} ms",
                f"{_where(slowest)}, on {slowest.apart.rank.device}; the fastest round, without waiting for others",
            ),
        ],
        sections=[
            _places(outcomes),
            *(_place(one, layout, cluster) for one in outcomes),
            page.Section("What it is not", [_NOT]),
        ],
        footer="Written by python -m launch.replay; replay.json beside it holds every number.",
    )


def _where(one: Outcome) -> str:
    return f"rank {one.apart.rank.mesh.rank}, step {one.fullest.step + 1:,}"


def _compute_ms(one: Outcome) -> float:
    """Return the time of a step without answers, the median of the steps' fastest rounds."""
    rounds: dict[int, list[float]] = {}
    for step in one.apart.rank.steps:
        rounds.setdefault(step.step, []).append(step.times.step_ms - step.answers_ms)
    return statistics.median(min(times) for times in rounds.values())


def _places(outcomes: Sequence[Outcome]) -> page.Section:
    rows = []
    for one in outcomes:
        step = one.apart.rank.steps[0]
        rows.append(
            [
                one.chosen.why,
                f"{one.apart.rank.mesh.rank:,}",
                f"{step.step + 1:,}",
                str(step.k),
                f"{int(step.rows.computed_ym.sum()):,}",
                f"{int(step.rows.bytes_y.sum()) / 1e6:,.3f}",
                f"{one.fullest.most / 1e6:,.2f}",
                f"{_compute_ms(one):,.1f}",
                f"{one.apart.seconds:,.0f}",
            ]
        )
    header = ["chosen for", "rank", "step", "k", "expert rows", "MB sent", "MB held", "own ms", "replayed in s"]
    return page.Section("Places", [Table(header, rows, notes=["MB: 1e6 bytes; rows and bytes of all layers"])])


def _place(one: Outcome, layout: Layout, cluster: ClusterConfig | None) -> page.Section:
    rank = one.apart.rank
    title = f"Rank {rank.mesh.rank} of {rank.mesh.world:,}: {one.chosen.why}"
    links = [_links(one, layout)] if rank.mesh.ep_size > 1 else []
    times = [_times(one), *([_network(one, cluster)] if cluster is not None else [])]
    return page.Section(title, [_memory(one), *times, *links])


def _memory(one: Outcome) -> Table:
    held, predicted = one.fullest, one.expected[one.steps.index(one.fullest.step)].memory
    rows = []
    for name, begin in _MOMENTS.items():
        guess = max(size for moment, size in predicted.moments.items() if moment.startswith(begin))
        found = held.peak_bytes[name]
        rows.append([name, f"{found / 1e6:,.2f}", f"{guess / 1e6:,.2f}", f"{found / guess - 1:+.1%}"])
    return Table(
        ["memory at the peak, MB (1e6)", "measured", "certificate", "difference"],
        rows,
        caption=f"Tensors of the device in step {held.step + 1:,}",
        notes=[
            f"plans are {byte_text(held.plan_bytes)} of it on a CPU; the whole process held"
            f" {byte_text(one.apart.process_bytes)} of host memory"
        ],
    )


def _times(one: Outcome) -> Table:
    steps = one.apart.rank.steps
    phases = [
        ("forward", statistics.median(step.times.forward_ms for step in steps)),
        ("of it attention", statistics.median(step.times.attention_ms for step in steps)),
        ("of it expert layers", statistics.median(step.times.experts_ms for step in steps)),
        ("backward", statistics.median(step.times.backward_ms for step in steps)),
        ("optimizer", statistics.median(step.times.optimizer_ms for step in steps)),
        ("waiting for a plan", statistics.median(step.times.plan_wait_ms for step in steps)),
        ("answers for other ranks", statistics.median(step.answers_ms for step in steps)),
        ("step", statistics.median(step.times.step_ms for step in steps)),
        ("processor time of the main thread", statistics.median(step.cpu_ms for step in steps)),
        ("planning, in its own thread", statistics.median(step.times.data_ms for step in steps)),
    ]
    names = sorted({name for step in steps for name in step.own_ms})
    own = [(name, statistics.median(step.own_ms.get(name, 0.0) for step in steps)) for name in names]
    own.sort(key=lambda part: -part[1])
    rows = [[name, f"{ms:,.2f}"] for name, ms in phases]
    rows += [[], *([f"host in {name}", f"{ms:,.2f}"] for name, ms in own)]
    return Table(
        ["time", "ms"],
        rows,
        caption=f"Median of {len(steps)} step{'s' * (len(steps) > 1)}",
        notes=[
            "forward, backward and optimizer have answers in them; host: ranges of the host without those inside, with"
            " backward passes, without answers; dispatch and combine pack and add up rows"
        ],
    )


def _network(one: Outcome, cluster: ClusterConfig) -> Table:
    mean = StepTime.mean(one.modelled)
    rows = [
        [name, f"{1e3 * getattr(mean, name):,.2f}"]
        for name in ("exchange", "hidden", "gradients", "attention", "experts", "rest", "optimizer")
    ]
    return Table(
        [f"a model of {cluster.name}", "ms"],
        rows,
        caption="What the network would add there: exchange that nothing hides, and gradients",
        notes=["of the slowest rank of the step; hidden: exchange beside computation, no part of the step"],
    )


def _links(one: Outcome, layout: Layout) -> Table:
    step, mesh = one.apart.rank.steps[0], one.apart.rank.mesh
    near_P = layout.placement.same_node_PP[mesh.ep_rank]
    sent_P = np.array(step.sent_bytes_P)
    most = int(sent_P.argmax())
    rows = [
        ["all", f"{sent_P.sum() / 1e6:,.3f}"],
        ["to ranks of its node", f"{sent_P[near_P].sum() / 1e6:,.3f}"],
        ["to other nodes", f"{sent_P[~near_P].sum() / 1e6:,.3f}"],
        [f"to rank {mesh.ep_ranks[most]}, the most", f"{sent_P[most] / 1e6:,.3f}"],
    ]
    return Table(["bytes sent in the step", "MB (1e6)"], rows)
