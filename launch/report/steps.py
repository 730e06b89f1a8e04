"""The report's sections about the inside of a step: load of the experts, time, and bytes between ranks."""

from math import isfinite, nan
from typing import Any

from foreroute.launch.page.parts import Bar, Bars, Chart, Curve, Section, Table, Verdict
from foreroute.launch.page.words import byte_text, number_text, percent
from foreroute.launch.report.charts import areas, by_place, curve, expert_maps, section, text
from foreroute.launch.report.run_data import RunData, metric_grid, metric_series, number, plain_dict

_PARTS = ("attention", "experts", "rest of forward", "backward", "optimizer", "outside")
_RANKS = 32  # that a table shows one by one


def experts(run: RunData) -> list[Section]:
    """Describe how evenly experts and ranks are loaded."""
    words = "Load is a number of rows (a token through one expert) over the mean: 1 everywhere is perfect balance."
    names = {"busiest expert, worst layer": "load_max_over_mean"}
    if several_ranks := run.most("rank_load_max_over_mean") > 1:
        names["busiest rank"] = "rank_load_max_over_mean"
    busiest = curve(run, "Busiest over the mean", "rows, busiest / mean", names, y_from=1, upper=True)
    layers = by_place(run, "layer_load", "Busiest expert of each layer", "rows, busiest / mean", of="layer", y_from=1)
    repeated = not several_ranks and any(isinstance(chart, Curve) for chart in layers)
    return section(
        "Experts",
        words,
        [] if repeated else busiest,  # lines of all layers have the worst one's
        layers,
        expert_maps(run),
        by_place(run, "rank_rows", "Rows that each rank computes", "rows in a step, thousands", of="rank", factor=1e-3),
    )


def time(run: RunData) -> list[Section]:
    """Describe how the time of a step is spent."""
    x, parts = _parts_over_steps(run)
    return section(
        "Time",
        areas("Time of a step", "ms in a step", x, parts),
        curve(run, "Symbols per second", "symbols per second, all ranks", {"all ranks": "tokens_per_second"}, y_from=0),
        curve(
            run,
            "Exchange between ranks",
            "ms in a step",
            {"exposed: no computation meanwhile": "exchange_exposed_ms", "hidden by computation": "exchange_hidden_ms"},
            y_from=0,
        ),
        curve(
            run,
            "Waiting for plans",
            "ms in a step",
            {"waiting in the step": "plan_wait_ms", "work in the background": "data_ms"},
            y_from=0,
        ),
        by_place(run, "rank_own_ms", "Each rank's own time in forward passes", "ms in a step", of="rank"),
        _time_table(run, x, parts),
        _rank_table(run),
    )


def exchange(run: RunData) -> list[Section]:
    """Describe the bytes between ranks, beside the certificate's; return no section for a run that sent none."""
    if not run.most("wire_bytes") > 0:
        return []
    names = {"all": "wire_bytes"}
    if run.most("wire_bytes_inside") > 0 and run.most("wire_bytes_between") > 0:
        names |= {"inside nodes": "wire_bytes_inside", "between nodes": "wire_bytes_between"}
    certified = plain_dict(plain_dict(run.facts.get("certificate")).get("wire_bytes_by_k"))
    charts = curve(run, "Bytes on the wire", "MB in a step, all ranks", names, factor=1e-6, y_from=0)
    means = _means_by_k(run)
    return section(
        "Exchange",
        "Rows of experts' inputs and results and of their gradients that ranks send to each other in one step.",
        _verdict(run),
        charts,
        by_place(run, "rank_wire_bytes", "Bytes that each rank sends", "MB in a step", of="rank", factor=1e-6),
        _bars(means, certified),
        _bytes_table(means, certified),
        _link_table(run),
    )


def _parts_over_steps(run: RunData) -> tuple[list[float], dict[str, list[float]]]:
    """Return the steps, and the milliseconds of each part of a step; the parts add up to step_ms."""
    lines: list[dict[str, Any]] = []
    for line in run.lines:
        ms = {name: number(line.get(f"{name}_ms")) for name in ("forward", "backward", "optimizer", "outside")}
        if not all(map(isfinite, ms.values())):
            continue
        inner = [number(line.get(f"{name}_ms")) for name in ("attention", "experts")]
        attention, of_experts = (value if isfinite(value) else 0.0 for value in inner)
        # a validation's forward passes may be among the two, which are otherwise parts of forward
        attention = min(attention, ms["forward"])
        of_experts = min(of_experts, ms["forward"] - attention)
        rest = ms.pop("forward") - attention - of_experts
        values = attention, of_experts, rest, *ms.values()
        lines.append({"step": line["step"], **dict(zip(_PARTS, values, strict=True))})
    found = {name: metric_series(lines, name) for name in _PARTS}
    return found[_PARTS[0]].x, {name: points.mean for name, points in found.items()}


def _time_table(run: RunData, x: list[float], parts: dict[str, list[float]]) -> list[Table]:
    if not x:
        return []
    whole = run.mean("step_ms")
    rows = [["whole step", text(whole, "{:,.2f}"), "100.0%"]]
    labels = {
        "forward": "forward",
        "attention": "forward, attention",
        "experts": "forward, experts",
        "own": "forward, without waiting for other ranks",
        "backward": "backward",
        "optimizer": "optimizer",
        "outside": "outside",
        "plan_wait": "outside, waiting for plans",
        "metric": "outside, metrics",
        "exchange_exposed": "exchange, exposed (in forward and backward)",
        "exchange_hidden": "exchange, hidden",
        "data": "background: reading and planning",
    }
    alone = number(run.facts.get("ranks")) == 1  # no exchange, and no other ranks to wait for
    means = {name: run.mean(f"{name}_ms") for name in labels}
    rows += [
        [label, text(means[name], "{:,.2f}"), percent(means[name], whole)]
        for name, label in labels.items()
        if isfinite(means[name]) and not (alone and (name == "own" or name.startswith("exchange")))
    ]
    note = "Means over all logged steps, of rank 0. Outside: neither forward, backward nor optimizer."
    return [Table(["part", "ms in a step", "of the step"], rows, "Mean time of a step", notes=[note])]


def _rank_table(run: RunData) -> list[Table]:
    """Tabulate the means of each rank; many ranks are summed up by least, mean and most."""
    names = {
        "own time, ms": ("rank_own_ms", 1.0),
        "waiting for plans, ms": ("rank_plan_wait_ms", 1.0),
        "exposed exchange, ms": ("rank_exchange_exposed_ms", 1.0),
        "memory, GB": ("rank_memory_bytes", 1e-9),
        "sent, MB": ("rank_wire_bytes", 1e-6),
        "rows computed": ("rank_rows", 1.0),
    }
    grids = {label: (metric_grid(run, name, 1), factor) for label, (name, factor) in names.items()}
    found = {label: factor * grid.values.mean(0) for label, (grid, factor) in grids.items() if grid}
    ranks = max((len(values) for values in found.values()), default=0)
    if ranks < 2 or any(len(values) != ranks for values in found.values()):
        return []
    header = ["rank", *found]
    if ranks <= _RANKS:
        rows = [[str(i), *(number_text(float(values[i])) for values in found.values())] for i in range(ranks)]
        return [Table(header, rows, "Means of each rank, in one step")]
    sums = {"least": "min", "mean": "mean", "most": "max"}
    rows = [
        [label, *(number_text(float(getattr(values, name)())) for values in found.values())]
        for label, name in sums.items()
    ]
    rows.append(["rank with the most", *(str(int(values.argmax())) for values in found.values())])
    return [Table(header, rows, f"Means of {ranks:,} ranks, in one step")]


def _verdict(run: RunData) -> list[Verdict]:
    """Return a verdict on the certificate that the run was held to; none if it had no certificate."""
    certificate = plain_dict(run.facts.get("certificate"))
    if not certificate:
        return []
    path, state = certificate.get("path", "a certificate"), run.state.get("state")
    if state == "failed":
        words = f"Held to {path}; the run failed, and its terminal output tells whether it differed from that."
        return [Verdict(words, False)]
    until = "" if state == "complete" else " so far"
    begin = certificate.get("from_step") or 0
    since = f" after step {begin:,}" if begin else ""
    words = (
        f"Held to {path}: every counted step{since}{until} computed the certified rows and sent the certified bytes;"
        " the first difference would have ended the run."
    )
    return [Verdict(words, True)]


def _link_table(run: RunData) -> list[Table]:
    """Tabulate the mean bytes on each link, of up to 16 ranks."""
    found = metric_grid(run, "link_bytes", 2)
    if not found:
        return []
    means = found.values.mean(0)
    header = ["from rank", *(f"to {place}" for place in range(means.shape[1]))]
    rows = [[str(rank), *(byte_text(float(value)) for value in to)] for rank, to in enumerate(means)]
    note = "Expert groups are consecutive ranks; the columns are the ranks of the sender's group, counted in it."
    return [Table(header, rows, "Bytes on each link in one step, mean", notes=[note])]


def _means_by_k(run: RunData) -> dict[str, tuple[int, float]]:
    """Return, for each k, the number of lines logged at it and their mean bytes of a step."""
    found: dict[str, list[float]] = {}
    for line in run.lines:
        k, value = number(line.get("k")), number(line.get("wire_bytes"))
        if isfinite(k) and isfinite(value):
            found.setdefault(f"{k:.0f}", []).append(value)
    return {k: (len(values), sum(values) / len(values)) for k, values in found.items()}


def _bars(means: dict[str, tuple[int, float]], certified: dict[str, Any]) -> list[Chart]:
    ks = [k for k in means if isfinite(number(certified.get(k)))]
    if not ks:
        return []
    logged, said = [means[k][1] / 1e6 for k in ks], [number(certified[k]) / 1e6 for k in ks]
    bars = [Bar("logged", [logged]), Bar("certified", [said])]
    return [Bars("Bytes against the certificate", "active experts k", "MB in a step, all ranks", ks, bars, ["mean"])]


def _bytes_table(means: dict[str, tuple[int, float]], certified: dict[str, Any]) -> Table:
    header = ["k", "lines logged", "mean bytes of a step"]
    rows = [[k, f"{lines:,}", byte_text(mean)] for k, (lines, mean) in means.items()]
    if not certified:
        return Table(header, rows, text_columns=0)
    for row, (k, (_, mean)) in zip(rows, means.items(), strict=True):
        said = number(certified.get(k, nan))
        row += [byte_text(said) if isfinite(said) else "-", f"{100 * (mean / said - 1):+.2f}%" if said > 0 else "-"]
    note = (
        "Certified is the mean over all counted steps of that k; logged is the mean over the lines of metrics.jsonl,"
        " which need not have all of these steps, or those of one k alone: a difference here is no fault. Held to a"
        " certificate, each step is compared exactly."
    )
    return Table([*header, "certified", "logged to certified"], rows, text_columns=0, notes=[note])
