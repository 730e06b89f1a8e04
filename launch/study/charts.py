"""The charts of a study, as means over seeds: valid bpc over tokens, FLOPs and seconds, and test bpc over k.

A chart can tell six lines apart. The first arm is in every chart; the charts share out the other arms.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from foreroute.launch.page.parts import COLOURS, Curve, Line, Part
from foreroute.launch.study.comparisons import arms_of, evaluated_k, mean_curve, reference_arm, seeds_mean
from foreroute.launch.study.preset import Preset
from foreroute.launch.study.results import Results

_AXES = {
    "symbols": ("symbols trained on", 1.0, "symbols"),
    "flops": ("FLOP of training, 1e12", 1e12, "FLOP"),
    "seconds": ("training time, s", 1.0, "time"),
}


def lead_chart(preset: Preset, results: Results) -> list[Part]:
    """Chart test bpc of the preset's main arms over the arithmetic of a forward pass, or over k if an arm does not know
    it."""
    names = preset.lead or ({arm: arm for arm in preset.arms} if len(preset.arms) <= COLOURS else {})
    there = {arm: results.first_of(arm) for arm in names if results.seeds_of(arm)}
    every_k = evaluated_k(results)
    flops = {arm: run["flops_per_symbol"] or {} for arm, run in there.items()}
    known = all(flops.values())
    lines = []
    for arm, run in there.items():
        if known and "dense" in run["bpc"]:
            means = [(flops[arm]["dense"] / 1e6, seeds_mean(results, arm, None))]
        else:
            means = [(flops[arm].get(str(k), 0) / 1e6 if known else k, seeds_mean(results, arm, k)) for k in every_k]
        points = [(x, mean.mean) for x, mean in means if mean]
        lines.append(Line(names[arm], [x for x, _ in points], [y for _, y in points]))
    if not any(line.x for line in lines):
        return []
    label = "MFLOP per symbol, forward pass" if known else "active experts k"
    return [Curve("Test bpc of the main arms", label, "bits per symbol", lines, x_log=not known)]


def curve_charts(preset: Preset, results: Results) -> list[Part]:
    """Chart valid bpc at k_max over training, for each axis that was recorded."""
    curves = {(arm, axis): mean_curve(results, arm, axis) for arm in preset.arms for axis in _AXES}
    groups = _groups(preset, [arm for arm in preset.arms if any(curves[arm, axis] for axis in _AXES)])
    found: list[Part] = []
    for title, arms in _titled("Valid bpc over training", groups):
        for axis, (label, unit, choice) in _AXES.items():
            lines = [
                Line(arm, [x / unit for x, _ in points], [y for _, y in points], dashed=arm == reference_arm(preset))
                for arm in arms
                if (points := curves[arm, axis])
            ]
            if lines:
                found.append(Curve(title, label, "bits per symbol", lines, choice=choice))
    return found


def slimming_charts(preset: Preset, results: Results) -> list[Part]:
    """Chart test bpc over the number of active experts."""
    every_k = evaluated_k(results)
    if not every_k:
        return []
    found: list[Part] = []
    groups = _groups(preset, arms_of(preset, results))
    for title, arms in _titled("Test bpc over active experts", groups):
        lines = []
        for arm in arms:
            means = [(k, mean.mean) for k in every_k if (mean := seeds_mean(results, arm, k))]
            lines.append(Line(arm, [k for k, _ in means], [y for _, y in means], dashed=arm == reference_arm(preset)))
        found.append(Curve(title, "active experts k", "bits per symbol", lines, x_log=True))
    return found


def _groups(preset: Preset, arms: Sequence[str]) -> list[list[str]]:
    """Share the arms out over charts evenly, with the first arm of the study in each chart."""
    first = reference_arm(preset)
    others = [arm for arm in arms if arm != first]
    charts = -(-len(others) // (COLOURS - 1)) or 1
    bounds = [len(others) * i // charts for i in range(charts + 1)]
    found = [[*([first] if first in arms else []), *others[low:high]] for low, high in pairwise(bounds)]
    return [group for group in found if group]


def _titled(title: str, groups: Sequence[list[str]]) -> Iterator[tuple[str, list[str]]]:
    """Return the groups with a title each, numbered if there are several."""
    for i, arms in enumerate(groups, 1):
        yield f"{title}, {i} of {len(groups)}" if len(groups) > 1 else title, arms
