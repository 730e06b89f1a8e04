"""Describe a study as a page: its runs, its results at equal tokens, FLOPs and time and at each k, and its experts.

Every number is computed from the result files. Their meaning is written by hand, in docs/study/NAME_discussion.md. The
page names the runs that are missing.
"""

from foreroute.launch.page import parts as page
from foreroute.launch.page.parts import KeyFigure, Page, Table
from foreroute.launch.study.charts import curve_charts, lead_chart, slimming_charts
from foreroute.launch.study.comparisons import (
    AXES,
    POINTS,
    Comparison,
    all_runs,
    arms_of,
    compare_along,
    compare_on_test,
    compared_k,
    comparisons,
    evaluated_k,
    experts_of,
    missing,
    own_pairs,
    pairs_of,
    ratio,
    reference_arm,
    seeds_mean,
    used,
)
from foreroute.launch.study.experts import experts_section, routes_section
from foreroute.launch.study.intervals import Estimate, estimate
from foreroute.launch.study.preset import Preset
from foreroute.launch.study.results import Result, Results, best_rate, own_bpc

NONE = "-"  # in a table: not there
_CUT = (
    "* No fair comparison: one of the two was read in the middle of its schedule of the learning rate, to its"
    " disadvantage."
)

PUBLISHED = (("linear", "1.1776", "1.1486"), ("exponential", "1.2167", "1.1877"), ("cosine", "1.2142", "1.1858"))
"""Schedule of k, and test bpc of SMoE-Dropout at k = N/2 and k = N: Transformer-XL on enwik8, 4 layers of width 256
with 16 experts, 400,000 steps (arXiv 2303.01610, as quoted by a secondary source)."""


def study_page(name: str, preset: Preset, results: Results) -> Page:
    """Describe a study, finished or not."""
    sections = [_run(preset, results)]
    if results.runs:
        sections = [*_lead(preset, results), *sections]
        sections += [
            _claims(preset, results),
            _budgets(preset, results),
            _slimming(preset, results),
            _pairs(preset, results),
            _cost(preset, results),
            experts_section(preset, results),
            routes_section(preset, results),
            _published(results),
        ]
    sections += [_rates(preset, results), _limits(preset, results), _again(name)]
    return Page(
        title=f"Study: {name}",
        lead=(
            "This study compares arms that route tokens to experts in different ways. All arms of a seed were trained"
            " on the same symbols in the same order. bpc is bits per symbol of text that was not trained on; lower is"
            " better. Intervals are 95%, over seeds, of differences paired by seed."
        ),
        sections=sections,
        figures=_figures(preset, results),
        footer="Every number here was computed from the result files in the JSON file beside this page.",
    )


def _lead(preset: Preset, results: Results) -> list[page.Section]:
    """Return the chart of the main arms, if there is one."""
    chart = lead_chart(preset, results)
    words = (
        "Points are means over seeds. A line is one trained model at each number of active experts, from 1 on; a dense"
        " model is a point."
    )
    return [page.Section("The main arms", [*chart, words])] if chart else []


def interval_text(found: Estimate | None, digits: int = 3, sign: str = "") -> str:
    """Write a mean with its interval."""
    if found is None:
        return NONE
    mean = f"{found.mean:{sign}z.{digits}f}"
    if found.low is None or found.high is None:
        return f"{mean} (1 seed)"
    return f"{mean} [{found.low:{sign}z.{digits}f}, {found.high:{sign}z.{digits}f}]"


def change(found: Comparison | None) -> str:
    """Write a difference of bpc with its interval; a star marks a comparison that is not fair."""
    return NONE if found is None else interval_text(found.difference, 4, "+") + (" *" if found.cut else "")


def _figures(preset: Preset, results: Results) -> list[KeyFigure]:
    """Return key figures of the first fair pair at equal tokens, FLOPs and time."""
    runs = f"{sum(map(len, results.runs.values()))} of {len(preset.runs)}"
    wanted = own_pairs(preset) or pairs_of(preset, results)
    pairs = [pair for pair in wanted if all(results.seeds_of(arm) for arm in pair)]
    axes = AXES if pairs else ()
    return [KeyFigure("Runs", runs, "arms times seeds, done"), *(_figure(results, pairs, axis) for axis in axes)]


def _figure(results: Results, pairs: list[tuple[str, str]], axis: str) -> KeyFigure:
    """Return the key figure of the first pair of which both arms ended there."""
    title = f"bpc at {AXES[axis]}"
    compared = (compare_along(results, a, b, axis) for a, b in pairs)
    fair = next((c for c in compared if c is not None and not c.cut), None)
    if fair is None:
        return KeyFigure(title, NONE, "no fair pair")
    d = fair.difference
    interval = "one seed" if d.low is None else f"{d.low:+.4f} to {d.high:+.4f}"
    return KeyFigure(title, f"{d.mean:+.4f}", f"{fair.a} minus {fair.b}, valid; {interval}")


def _run(preset: Preset, results: Results) -> page.Section:
    runs = all_runs(results)
    gone = missing(preset, results)
    symbols = f"{preset.valid_symbols:,}" if preset.valid_symbols else "all"
    own = {f"of {arm} ": preset.arms[arm].seeds for arm in preset.arms if preset.arms[arm].seeds}
    seeds = [words + ", ".join(map(str, numbers)) for words, numbers in ({"": preset.seeds} | own).items()]
    rows = {
        "Arms": ", ".join(preset.arms),
        "Seeds": "; ".join(seeds),
        **(_protocol(runs) if runs else {}),
        "What a seed sets": "the initial weights, dropout, a hashed router's tables, and the place in the text where"
        " the streams begin (data.start); all arms of a seed read the same symbols in the same order",
        "Checkpoint": "the last one of each run is tested; no checkpoint is chosen by its score",
        "During training": f"{preset.points} validations at k_max, the largest k in training, on {symbols} symbols of"
        " the valid split",
    }
    parts: list[page.Part] = [Table([], list(rows.items()), text_columns=2)]
    if gone:
        parts.append(
            f"Missing: {len(gone)} of {len(preset.runs)} runs ({', '.join(gone)}). Everything below"
            " is about the others."
        )
    return page.Section("What was run", parts)


def _protocol(runs: list[Result]) -> dict[str, str]:
    """Return table rows about text, model and training of the first run; the arms' differences are in their
    experiments."""
    first, o = runs[0], runs[0]["options"]
    tokens = (
        "bytes, true bits per byte"
        if first["tokens"] == "bytes"
        else "without newlines, as published Transformer-XL numbers; not comparable to bits per byte"
    )
    shape = {
        "model.layers": "layers",
        "model.width": "wide",
        "data.segment": "symbols a segment",
        "data.streams": "streams",
        "model.memory": "memory",
    }
    shown = ", ".join(f"{o[key]} {words}" for key, words in shape.items() if key in o)
    lengths, steps, cores = (
        " or ".join(f"{n:,}" for n in sorted(set(found)))
        for found in (
            (run["steps"] * run["symbols_per_step"] for run in runs),
            (run["steps"] for run in runs),
            (run["measured"]["cores"] for run in runs),
        )
    )
    parameters = [run["parameters"] for run in runs]
    return {
        "Text": f"{first['corpus']}, sha256 {first['corpus_sha256'][:16]}..., {first['test_symbols']:,} symbols tested",
        "Symbols": tokens,
        "Model": f"{shown}; {min(parameters):,} to {max(parameters):,} parameters",
        "Training": f"{lengths} symbols in {steps} steps",
        "Code": _commits(runs),
        "Machine": f"processes of one thread on {cores} cores",
    }


def _commits(runs: list[Result]) -> str:
    """List the commits that the runs were made with, each once."""
    found = set()
    for code in (run.get("code") or {} for run in runs):
        changed = ", with files changed since" if code.get("changed") else ""
        found.add(f"{code['commit'][:12]}{changed}" if code.get("commit") else "commit unknown")
    return f"{len(found)} commits: {'; '.join(sorted(found))}" if len(found) > 1 else found.pop()


def _claims(preset: Preset, results: Results) -> page.Section:
    """Tabulate claims about the preset's own pairs (every arm and the first one, if it has none)."""
    rows, apart = [], []
    for a, b in own_pairs(preset) or pairs_of(preset, results):
        tested = compare_on_test(results, a, b, None)
        if tested is None:
            apart.append(f"{a} and {b}")
            continue
        cost = [interval_text(ratio(results, a, b, axis), 2).partition(" ")[0] for axis in ("flops", "seconds")]
        budgets = [compare_along(results, a, b, axis) for axis in ("flops", "seconds")]
        fair = [c for c in budgets if c is not None and not c.cut]
        rows += [[a, b, c.claim, change(c), c.at, str(c.difference.n), *cost] for c in (tested, *fair)]
    notes = [
        "A percentage stands only where the interval excludes 0. An arm that was read before its end was in the middle"
        " of its schedule of the learning rate, to its disadvantage: nothing is claimed of such a pair. It stands in"
        " the tables below, with a star.",
        "FLOPs and time: the arm's whole training over that of the arm beside it.",
    ]
    notes += [f"No seed of both is there: {', '.join(apart)}."] if apart else []
    header = ["arm", "against", "claim", "difference of bpc", "compared on", "seeds", "FLOPs", "time"]
    return page.Section("What the intervals allow to say", [Table(header, rows, text_columns=5, notes=notes)])


def _budgets(preset: Preset, results: Results) -> page.Section:
    first = reference_arm(preset)
    rows = []
    for arm in arms_of(preset, results):
        compared = [compare_along(results, arm, first, axis) for axis in AXES] if arm != first else [None] * len(AXES)
        rows.append([arm, interval_text(seeds_mean(results, arm, None)), *(change(c) for c in compared)])
    header = ["", "test bpc at own k", *(f"valid, {words}" for words in AXES.values())]
    notes = [
        (
            f"Differences are to {first}. They are bpc on the valid split at each arm's own k_max; values between two"
            " points of a curve are interpolated linearly."
        ),
        "At equal FLOPs or time both arms are read at the point where the cheaper one ended.",
        _CUT,
    ]
    if not any(used(run, "flops") for arm in arms_of(preset, results) for run in results.seeds_of(arm).values()):
        notes.append("The runs did not record FLOPs.")
    charts = curve_charts(preset, results)
    return page.Section("At equal tokens, FLOPs and time", [Table(header, rows, notes=notes), *charts])


def _slimming(preset: Preset, results: Results) -> page.Section:
    every_k = evaluated_k(results)
    rows = [
        [
            arm,
            str(results.first_of(arm)["k_max"] or NONE),
            *(interval_text(seeds_mean(results, arm, k)) for k in every_k),
        ]
        for arm in arms_of(preset, results)
    ]
    notes = [
        "One trained model per arm and seed is evaluated at every k without further training. A dense model has one"
        " value for every k."
    ]
    counting = results.first_of(next(iter(results.runs)))["counting"]
    if counting:
        cut = counting.get("counted_symbols")
        known = f"the first {cut:,} symbols" if cut else "all"
        notes.append(
            f"On the same test text, models that count n-grams reach {counting['order2_bpc']:.3f} (order 2) and"
            f" {counting['order3_bpc']:.3f} (order 3), and bzip2 -9 {counting['bzip2_bpc']:.3f}. They count {known} of"
            " the training text, whatever part of it the arms read."
        )
    table = Table(["", "own k", *(f"k = {k}" for k in every_k)], rows, caption="Test bpc", notes=notes)
    return page.Section("At each number of active experts", [table, *slimming_charts(preset, results)])


def _pairs(preset: Preset, results: Results) -> page.Section:
    pairs, ks = pairs_of(preset, results), compared_k(results)
    at_k = [[f"{a} - {b}", *(change(compare_on_test(results, a, b, k)) for k in ks)] for a, b in pairs]
    over_time = [
        [f"{a} - {b}", *(change(compare_along(results, a, b, "symbols", share)) for share in POINTS)] for a, b in pairs
    ]
    names = ["own k" if k is None else f"k = {k}" for k in ks]
    shares = [f"{share:.0%} of training" for share in POINTS]
    caption = "Difference of valid bpc at k_max, at equal tokens"
    return page.Section(
        "Differences between arms",
        [
            Table(["", *names], at_k, caption="Difference of test bpc"),
            Table(["", *shares], over_time, caption=caption, notes=[_CUT]),
        ],
    )


def _cost(preset: Preset, results: Results) -> page.Section:
    first, rows = reference_arm(preset), []
    flops_of = {arm: results.first_of(arm)["flops_per_symbol"] or {} for arm in arms_of(preset, results)}
    every_k = evaluated_k(results) if any(flops_of.values()) else []
    for arm, flops in flops_of.items():
        runs = list(results.seeds_of(arm).values())
        seconds = estimate([run["measured"]["training_seconds"] for run in runs])
        inference = [flops.get(str(k), flops.get("dense")) for k in every_k]
        rows.append(
            [
                arm,
                f"{runs[0]['parameters']:,}",
                interval_text(ratio(results, arm, first, "flops"), 3),
                f"{seconds.mean:,.0f}",
                interval_text(ratio(results, arm, first, "seconds"), 2),
                *(NONE if each is None else f"{each / 1e6:.2f}" for each in inference),
            ]
        )
    header = [
        "",
        "parameters",
        f"training FLOPs / {first}",
        "training time, s",
        f"time / {first}",
        *(f"MFLOP a symbol, k = {k}" for k in every_k),
    ]
    notes = [
        "Seconds are of training steps alone, on a machine that runs several arms at a time; ratios are paired by seed."
        " FLOPs a symbol are of a forward pass."
    ]
    return page.Section("What it costs", [Table(header, rows, notes=notes)])


def _published(results: Results) -> page.Section:
    experts = experts_of(results)
    ours = [
        [f"{arm} (here)", *(interval_text(seeds_mean(results, arm, k)) for k in (experts // 2, experts))]
        for arm in ("frozen_growing", "hashed_growing")
        if results.seeds_of(arm)
    ]
    rows = [*([f"SMoE-Dropout, {schedule}", *bpc] for schedule, *bpc in PUBLISHED), [], *ours]
    notes = [
        "Published: Transformer-XL of 4 layers and width 256 with 16 experts, all of enwik8 without newlines, 400,000"
        " steps (about 50 passes), one seed, its own evaluation protocol; taken from a secondary source that quotes the"
        " paper (arXiv 2303.01610). Ours differ in the size of model and text, in the length of training and, where the"
        " symbols are bytes, in what a symbol is. The two groups cannot be compared with each other; only differences"
        " inside one group mean something."
    ]
    return page.Section("Beside the published numbers", [Table(["test bpc", "k = N/2", "k = N"], rows, notes=notes)])


def _rates(preset: Preset, results: Results) -> page.Section:
    """Tabulate the rates that were tried, and name the best ones."""
    if not results.tuning:
        rates = sorted({run["learning_rate"] for run in all_runs(results)})
        text = f"No learning rate was tried. Taken by the arms: {', '.join(f'{rate:g}' for rate in rates)}."
        return page.Section("Learning rates", [text])
    by_arm = sorted(results.tuning, key=lambda r: (r["arm"], r["tries"]))
    rows = [[r["arm"], f"{r['tries']:g}", f"{own_bpc(r):.4f}", f"{r['steps']:,}"] for r in by_arm]
    steps = max((run["steps"] for run in all_runs(results)), default=0)
    note = "On the valid split at k_max, by runs with a seed of their own; the lowest bpc decides."
    if steps > by_arm[0]["steps"]:
        note += (
            f" These are shorter than the arms' {steps:,} steps, for which the best rate may be lower. The curves below"
            " and above are of the beginning of the same split."
        )
    parts: list[page.Part] = [Table(["tried with", "learning rate", "valid bpc", "steps"], rows, notes=[note])]
    for kin in dict.fromkeys(r["arm"] for r in by_arm):
        rates = [r["tries"] for r in by_arm if r["arm"] == kin]
        best = best_rate(results.tuning, kin)
        arms = ", ".join(name for name, arm in preset.arms.items() if arm.kin == kin)
        edge = " It is at the end of the grid: a better one may lie outside." if best in (rates[0], rates[-1]) else ""
        parts.append(f"{best:g} is the best for {kin}; taken by {arms}.{edge}")
    return page.Section("Learning rates", parts)


def _limits(preset: Preset, results: Results) -> page.Section:
    found = comparisons(preset, results)
    with_interval = [c for c in found if c.difference.low is not None and not c.cut]
    excluding = sum(c.difference.sign != 0 for c in with_interval)
    rates = (
        f"Learning rates were tried with {', '.join(preset.kin)} alone. Every other arm took the rate of its kin, which"
        " can differ from its own best."
    )
    counted = (
        f"{len(with_interval)} fair differences with an interval were computed; {excluding} of the intervals exclude 0."
        " If the true difference is 0, one interval in twenty excludes it by chance, so a single one proves little."
    )
    texts = [
        counted,
        "Intervals are over seeds, by Student's t. They hold for this text, this size and this length of training, and"
        " say nothing about others.",
        *([rates] if results.tuning else []),
        "An arm whose k grows is validated at k_max from the start, before it has trained at it: its curve says little"
        " before the end.",
        "Seconds are processor time of the thread that trains, which other work on the machine changes less; on a GPU"
        " they are elapsed time.",
        *preset.limits,
    ]
    return page.Section("Limits", texts)


def _again(name: str) -> page.Section:
    command = f"python -m launch.study preset={name} corpus.path=FILE\npython -m launch.study preset={name} report=true"
    words = (
        "The first command continues where it was stopped. The second writes this page from the result files or, if"
        " there are none, from the JSON file beside it."
    )
    return page.Section("Run it again", [page.Code(command), words])
