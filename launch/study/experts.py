"""The sections of a study's page about experts and routes: similarity of experts, load, and change of routes.

The numbers are those of launch.analyse, means over seeds.
"""

import math
from typing import Any

from foreroute.engine.evaluation.expert_analysis import COMPARED_TOKENS
from foreroute.launch.page import parts as page
from foreroute.launch.page.parts import Table
from foreroute.launch.study.comparisons import all_runs, arms_of, experts_of
from foreroute.launch.study.intervals import estimate
from foreroute.launch.study.preset import Preset
from foreroute.launch.study.results import Results

_NONE = "-"


def experts_section(preset: Preset, results: Results) -> page.Section:
    """Tabulate the similarity of the experts' outputs and weights, at the start and at the end."""
    kinds = [(kind, when) for kind in ("output_similarity", "weight_similarity") for when in ("start", "end")]
    rows = [
        [arm, *(_mean([a[kind][when] for a in found]) for kind, when in kinds)]
        for arm, found in _analyses(preset, results).items()
    ]
    notes = [
        "Mean cosine similarity over all pairs of experts of a layer, mean over layers and seeds. Outputs: of all"
        f" experts for the same tokens, at most {COMPARED_TOKENS:,}, of {_sample(results)}, whoever is active; 1 would"
        " be collapse to one expert. Weights: of the flattened parameters. A permutation of an expert's hidden units"
        " does not change its output, so different weights do not prove different experts; different outputs do."
    ]
    header = ["", "outputs, start", "outputs, end", "weights, start", "weights, end"]
    return page.Section("How alike the experts are", [Table(header, rows, notes=notes)] if rows else [_nothing()])


def routes_section(preset: Preset, results: Results) -> page.Section:
    """Tabulate load, mixing weights and routing change."""
    half = str(max(1, experts_of(results) // 2))
    stochastic = [arm for arm in arms_of(preset, results) if results.first_of(arm)["router"] == "stochastic"]
    load, changes = [], []
    for arm, found in _analyses(preset, results).items():
        own = str(found[0]["k_max"])
        loads = [
            _NONE if arm in stochastic else _mean([a["routes"].get(k, {}).get(name) for a in found])
            for k in (half, own)
            for name in ("load_max_over_mean", "load_entropy")
        ]
        load.append([arm, *loads, _mean([math.exp(a["routes"][own]["weight_entropy"]) for a in found]), own])
        between = [a["routing_change"]["between"] for a in found]
        if all(between):
            whole, last = ([b[-1]["share"] for b in between], [b[-2 if len(b) > 1 else -1]["share"] for b in between])
            changes.append([arm, *(f"{estimate(shares).mean:.1%}" for shares in (whole, last))])
    if not load:
        return page.Section("Load and routes", [_nothing()])
    header = [
        "",
        f"busiest / mean, k = {half}",
        f"entropy, k = {half}",
        "busiest / mean, own k",
        "entropy, own k",
        "experts by weight, own k",
        "own k",
    ]
    drawn = (
        f" {', '.join(stochastic)} sends all tokens of a pass to the same experts: a load of so few passes would say"
        " nothing."
    )
    notes = [
        f"On {_sample(results)}, means over layers and seeds. Entropy is that of the experts' shares of the rows over"
        " log E: 1 is even, and so it is at k = E whatever the router. Experts by weight: e to the entropy of a"
        f" token's mixing weights; k for equal weights.{drawn if stochastic else ''}"
    ]
    parts: list[page.Part] = [Table(header, load, notes=notes)]
    if changes:
        caption = f"Tokens of the test text whose {half} active experts changed"
        note = (
            "From the start of training to its end, and between the last two checkpoints: the share in a layer, mean"
            " over layers. A hashed route is a function of the text: 0 by construction. Routers that draw anew in every"
            " pass, and shuffled keys, are left out."
        )
        parts.append(Table(["", "start to end", "last two checkpoints"], changes, caption=caption, notes=[note]))
    return page.Section("Load and routes", parts)


def _analyses(preset: Preset, results: Results) -> dict[str, list[dict[str, Any]]]:
    """Return the analyses by arm, of the arms that have any."""
    found = {arm: [run["analysis"] for run in results.seeds_of(arm).values() if run["analysis"]] for arm in preset.arms}
    return {arm: analyses for arm, analyses in found.items() if analyses}


def _sample(results: Results) -> str:
    """Describe the text on which the experts were analysed."""
    found = sorted({run["analysis"]["symbols"] for run in all_runs(results) if run["analysis"]})
    return f"the first {' or '.join(f'{n:,}' for n in found)} symbols of the test text"


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{estimate(known).mean:z.3f}" if known else _NONE


def _nothing() -> str:
    return "No run with experts is there."
