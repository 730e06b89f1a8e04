"""The cost of ranges in a few steps: their nesting, their own time, and a table of the most expensive ones.

A range's own time is its duration without the ranges inside it, so own times add up to the time of the step.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreroute.engine.parallel.in_flight import covered
from foreroute.engine.tracing import InFlight, Range

THREADS = "foreroute-"
"""The prefix of our own threads' names; ranges of other threads belong to the main thread, which waits for them in
backward."""
MAIN = "main"
TOP = 10


@dataclass(slots=True)
class Nested:
    """A range and its place in the nesting."""

    name: str
    track: str  # MAIN, or the name of one of our threads
    path: str  # names from the outermost range to this one: "step 5/forward/experts"
    begin_ns: int
    end_ns: int
    own_ns: int  # without the ranges inside


def nest(ranges: Sequence[Range]) -> list[Nested]:
    """Compute the nesting of ranges; the result has the order of the argument.

    Example: ("step 1", 0 to 10) with ("forward", 2 to 8) inside has 4 of its own.
    """
    found: dict[int, Nested] = {}
    open_ranges: dict[str, list[Nested]] = defaultdict(list)
    for index in sorted(range(len(ranges)), key=lambda i: (ranges[i].begin_ns, -ranges[i].end_ns)):
        name, thread, begin_ns, end_ns = ranges[index]
        track = thread.removeprefix(THREADS) if thread.startswith(THREADS) else MAIN
        stack = open_ranges[track]
        while stack and stack[-1].end_ns <= begin_ns:
            stack.pop()
        path = f"{stack[-1].path}/{name}" if stack else name
        if stack:
            stack[-1].own_ns -= end_ns - begin_ns
        found[index] = Nested(name, track, path, begin_ns, end_ns, end_ns - begin_ns)
        stack.append(found[index])
    return [found[index] for index in range(len(ranges))]


def costs(nested: Sequence[Nested]) -> dict[str, list[float]]:
    """Sum the ranges of all steps, and those of other threads: calls, ms and own ms per step.

    The keys are paths inside the step, such as "forward/experts", and "step" for the steps themselves.
    """
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for part in nested:
        step, _, inner = part.path.partition("/")
        if part.track != MAIN:
            key = f"{part.path} ({part.track})"
        elif step.startswith("step "):
            key = inner or "step"
        else:
            continue
        for i, value in enumerate((1, (part.end_ns - part.begin_ns) / 1e6, part.own_ns / 1e6)):
            totals[key][i] += value
    steps = max(1.0, totals["step"][0])
    return {key: [value / steps for value in values] for key, values in totals.items()}


def overlap_ms(nested: Sequence[Nested], flights: Sequence[InFlight]) -> tuple[float, float]:
    """Return the exchange's exposed time, in which computation waited, and its time hidden by computation, in ms.

    The definitions are those of engine/parallel/in_flight.py, applied to the ranges and collectives of all steps.
    """
    waited_ns = sum(part.end_ns - part.begin_ns for part in nested if part.name == "exchange")
    flown_ns = covered([(flight.issued_ns, flight.arrived_ns) for flight in flights])
    return waited_ns / 1e6, max(0.0, flown_ns - waited_ns) / 1e6


def summary(title: str, ranks: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the ten ranges with the most own time, and the share of the exchange hidden by computation.

    Args:
        ranks: results of every rank in order, or of rank 0 alone: "costs" as from `costs`, and "overlap_ms", the
            exchange's exposed and hidden time per step.
    """
    none = [0.0, 0.0, 0.0]
    first = ranks[0]["costs"]
    step_ms = first["step"][1]
    keys = dict.fromkeys(key for rank in ranks for key in rank["costs"])
    own_ms_R = {key: [rank["costs"].get(key, none)[2] for rank in ranks] for key in keys}
    top = sorted(own_ms_R, key=lambda key: -sum(own_ms_R[key]))[:TOP]
    names = ["(the step's rest)" if key == "step" else key for key in top]
    width = max(map(len, [*names, "range"]))
    lines = [
        f"{title}: {step_ms:.1f} ms a step. Ranges with the most own time, without the ranges inside them, of rank 0:",
        f"{'range':{width}}  {'calls':>6} {'ms':>9} {'own ms':>9} {'of step':>8}",
    ]
    if len(ranks) > 1:
        lines[1] += f"   own ms of {len(ranks)} ranks: {'mean':>9} {'max':>9} {'rank':>5}"
    for key, name in zip(top, names, strict=True):
        calls, ms, own_ms = first.get(key, none)
        line = f"{name:{width}}  {calls:6.4g} {ms:9.2f} {own_ms:9.2f} {own_ms / step_ms:8.1%}"
        if len(ranks) > 1:
            own_ms_r = own_ms_R[key]
            worst = max(range(len(ranks)), key=own_ms_r.__getitem__)
            gap = " " * len(f"   own ms of {len(ranks)} ranks:")
            line += f"{gap} {sum(own_ms_r) / len(ranks):9.2f} {own_ms_r[worst]:9.2f} {worst:5}"
        lines.append(line)
    return "\n".join([*lines, *_overlap(ranks)])


def _overlap(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    exposed_ms, hidden_ms = (
        sum(column) / len(ranks) for column in zip(*(rank["overlap_ms"] for rank in ranks), strict=True)
    )
    total_ms = exposed_ms + hidden_ms
    if total_ms == 0:
        return []
    return [
        f"exchange: {total_ms:.2f} ms a step in flight, {hidden_ms:.2f} ms ({hidden_ms / total_ms:.0%}) of it hidden "
        f"by computation (mean of {len(ranks)} rank{'s'[: len(ranks) > 1]})"
    ]
