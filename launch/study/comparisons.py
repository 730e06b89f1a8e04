"""Compare the arms of a study: means over seeds, and differences between two arms paired by seed, with 95% intervals.

Test numbers are of the last checkpoint, at a given k. Numbers over training are bpc on the valid split at the arm's own
largest k in training (k_max); a value between two points of the curve is interpolated linearly. At equal FLOPs or equal
seconds, both arms are read at the point where the cheaper arm ended. The other arm is then in the middle of its
learning rate schedule, and no claim is made about the difference.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from foreroute.launch.study.intervals import Estimate, estimate, paired, read_between
from foreroute.launch.study.preset import Preset
from foreroute.launch.study.results import Result, Results, bpc_at, own_bpc

POINTS = (0.25, 0.5, 1.0)  # of training, at which differences are given
_WHOLE = {"symbols": 0.97, "flops": 0.97, "seconds": 0.95}
"""Share of an arm's training from which on it counts as read at its end; seconds vary with other work."""
AXES = {"symbols": "equal tokens", "flops": "equal training FLOPs", "seconds": "equal training time"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Bits per symbol of arm a minus those of arm b over the seeds that both have."""

    a: str
    b: str
    at: str  # where: "test, own k", "test, k=8", "valid, 25% of equal tokens"
    difference: Estimate
    relative: float  # mean difference over b's mean, as a fraction
    cut: str = ""  # the arm that was read in mid-schedule, and where: no fair comparison

    @property
    def claim(self) -> str:
        """The claim that the numbers allow; a percentage only where the interval excludes 0 and no arm was read
        early."""
        if self.cut:
            return "none: no fair comparison"
        if self.difference.low is None:
            return "none: one seed has no interval"
        if self.difference.sign == 0:
            return "no difference is shown"
        return f"{abs(self.relative):.1%} {'below' if self.difference.sign < 0 else 'above'}"


def reference_arm(preset: Preset) -> str:
    """Return the arm that all others are compared with."""
    return next(iter(preset.arms))


def arms_of(preset: Preset, results: Results) -> list[str]:
    """Return the arms that have a run."""
    return [arm for arm in preset.arms if results.seeds_of(arm)]


def pairs_of(preset: Preset, results: Results) -> list[tuple[str, str]]:
    """Return every arm with the first, then the preset's own pairs, as far as both arms have a run."""
    first, there = reference_arm(preset), arms_of(preset, results)
    wanted = [(arm, first) for arm in preset.arms if arm != first] + own_pairs(preset)
    return list(dict.fromkeys((a, b) for a, b in wanted if a in there and b in there))


def own_pairs(preset: Preset) -> list[tuple[str, str]]:
    """Return the pairs that the preset names."""
    return [(a, b) for a, b in preset.pairs]


def seeds_mean(results: Results, arm: str, k: int | None) -> Estimate | None:
    """Estimate the mean test bpc of an arm at k (None: its own k); None if no run was evaluated there."""
    values = _test_values(results, arm, k)
    return estimate(list(values.values())) if values else None


def compare_on_test(results: Results, a: str, b: str, k: int | None) -> Comparison | None:
    """Compare on the test split at k (None: each arm at its own k); None if no seed is shared or k was not
    evaluated."""
    at = "test, own k" if k is None else f"test, k={k}"
    return _compare(a, b, at, _test_values(results, a, k), _test_values(results, b, k))


def compare_along(results: Results, a: str, b: str, axis: str, share: float = 1.0) -> Comparison | None:
    """Compare on the valid split during training, at a share of the amount of the axis that the cheaper arm used in
    all.

    Args:
        axis: one of AXES.
    """
    values_a: dict[int, float] = {}
    values_b: dict[int, float] = {}
    read: dict[str, list[float]] = {a: [], b: []}  # at which shares of their training
    of_a, of_b = results.seeds_of(a), results.seeds_of(b)
    for seed in of_a.keys() & of_b.keys():
        curves = [_axis(run, axis) for run in (of_a[seed], of_b[seed])]
        if not all(curves):
            continue
        at = share * min(curve[-1][0] for curve in curves)
        here, there = (read_between([x for x, _ in curve], [y for _, y in curve], at) for curve in curves)
        if here is not None and there is not None:
            values_a[seed], values_b[seed] = here, there
            for arm, curve in zip((a, b), curves, strict=True):
                read[arm].append(at / curve[-1][0])
    where = AXES[axis] if share == 1 else f"{share:.0%} of {AXES[axis]}"
    compared = _compare(a, b, f"valid, {where}", values_a, values_b)
    # of the seed that was read earliest
    early = {arm: part for arm, found in read.items() if (part := min(found, default=1)) < share * _WHOLE[axis]}
    cut = " and ".join(f"{arm} was read at {part:.0%} of its training" for arm, part in early.items())
    return compared and replace(compared, cut=cut)


def ratio(results: Results, a: str, b: str, axis: str) -> Estimate | None:
    """Estimate the amount of an axis that the training of one arm used, over that of another arm, seed by seed."""
    of_a, of_b = results.seeds_of(a), results.seeds_of(b)
    values = []
    for seed in sorted(of_a.keys() & of_b.keys()):
        ends = [used(run, axis) for run in (of_a[seed], of_b[seed])]
        if ends[0] is not None and ends[1]:
            values.append(ends[0] / ends[1])
    return estimate(values) if values else None


def used(run: Result, axis: str) -> float | None:
    """Return the amount of an axis that a run's whole training used; None if it was not recorded."""
    if axis == "seconds":
        return float(run["measured"]["training_seconds"])
    points = _axis(run, axis)
    return points[-1][0] if points else None


def mean_curve(results: Results, arm: str, axis: str) -> list[tuple[float, float]]:
    """Return points (axis, valid bpc) of an arm, means over its seeds; empty where the axis was not recorded."""
    curves = [_axis(run, axis) for run in results.seeds_of(arm).values()]
    if not curves or len({len(curve) for curve in curves}) != 1:
        return []
    return [
        (sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points))
        for points in zip(*curves, strict=True)
    ]


def missing(preset: Preset, results: Results) -> list[str]:
    """Name the runs of the preset that have no result file."""
    return [f"{arm}-seed{seed}" for arm, seed in preset.runs if seed not in results.seeds_of(arm)]


def experts_of(results: Results) -> int:
    """Return the number of experts of a layer, the largest of any arm."""
    return max((run["experts"] for run in all_runs(results)), default=0)


def compared_k(results: Results) -> list[int | None]:
    """Return the numbers of active experts at which arms are compared on the test split: their own (None), E / 2
    and E."""
    experts = experts_of(results)
    return [None, *sorted({k for k in (experts // 2, experts) if k})]


def evaluated_k(results: Results) -> list[int]:
    """Return the numbers of active experts at which any run was evaluated."""
    return sorted({int(k) for run in all_runs(results) for k in run["bpc"] if k.isdigit()})


def comparisons(preset: Preset, results: Results) -> list[Comparison]:
    """Return every comparison of the page and the JSON file."""
    pairs = pairs_of(preset, results)
    found: list[Comparison | None] = []
    for a, b in pairs:
        found += [compare_on_test(results, a, b, k) for k in compared_k(results)]
        found += [compare_along(results, a, b, axis, share) for axis in AXES for share in POINTS]
    return [c for c in found if c is not None]


def as_json(name: str, preset: Preset, results: Results) -> dict[str, Any]:
    """Return the contents of docs/study/NAME.json: the numbers of the page, and every result file."""
    arms: dict[str, Any] = {}
    for arm in arms_of(preset, results):
        at_k = {str(k): seeds_mean(results, arm, k) for k in evaluated_k(results)}
        bpc = {"own k": seeds_mean(results, arm, None), **at_k}
        arms[arm] = {k: asdict(found) for k, found in bpc.items() if found is not None}
    return {
        "study": name,
        "arms": arms,
        "differences": [asdict(c) for c in comparisons(preset, results)],
        "missing": missing(preset, results),
        "preset": asdict(preset),
        "results": [*results.tuning, *all_runs(results)],
    }


def all_runs(results: Results) -> list[Result]:
    """Return the runs of all arms and seeds."""
    return [run for by_seed in results.runs.values() for run in by_seed.values()]


def _compare(a: str, b: str, at: str, of_a: dict[int, float], of_b: dict[int, float]) -> Comparison | None:
    difference = paired(of_a, of_b)
    if difference is None:
        return None
    shared = of_a.keys() & of_b.keys()
    base = sum(of_b[seed] for seed in shared) / len(shared)
    return Comparison(a, b, at, difference, difference.mean / base)


def _test_values(results: Results, arm: str, k: int | None) -> dict[int, float]:
    """Return test bpc by seed."""
    found = {}
    for seed, run in results.seeds_of(arm).items():
        if k is None:
            found[seed] = own_bpc(run)
        elif "dense" in run["bpc"] or str(k) in run["bpc"]:
            found[seed] = bpc_at(run, k)
    return found


def _axis(run: Result, axis: str) -> list[tuple[float, float]]:
    """Return points (axis, valid bpc) of a run; empty where the axis was not recorded."""
    points = [(point[axis], point["valid_bpc"]) for point in run["curve"]]
    return [] if any(x is None for x, _ in points) else points
