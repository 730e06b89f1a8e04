"""Reports: their numbers are those of the run's files, a damaged or old folder gives a page that says what is
missing."""

import json
import shlex
import shutil
from itertools import pairwise
from math import isclose, isnan, nan

import numpy as np
import pytest

from foreroute.engine.config import Config
from foreroute.launch.page.parts import Areas, Bars, Chart, Curve, HeatMap, Table, Verdict
from foreroute.launch.page.words import count_text, duration
from foreroute.launch.report.one_run import changed_options, run_page
from foreroute.launch.report.run_data import POINTS, metric_grid, metric_series, read_run
from foreroute.launch.report.several_runs import Absent, several_page
from foreroute.launch.testing.run_folders import EXPERTS, LAYERS, RANKS, write_run
from foreroute.launch.testing.runs import small_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "whole")


def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "valid_bpc" in row]


def parts(page, kind):
    return {
        getattr(part, "title", getattr(part, "caption", "")): part
        for section in page.sections
        for part in section.parts
        if isinstance(part, kind)
    }


def line(chart, name):
    return next(line for line in chart.lines if line.name == name)


def words(page):
    """All text of a page."""
    found = [page.title, page.lead, *(f"{f.label} {f.value} {f.note}" for f in page.figures)]
    for section in page.sections:
        found.append(section.title)
        for part in section.parts:
            if isinstance(part, Table):
                found += [part.caption, *part.header, *(cell for row in part.rows for cell in row), *part.notes]
            elif isinstance(part, str | Verdict):
                found.append(part if isinstance(part, str) else part.text)
    return "\n".join(found)


def test_a_page_has_every_section_and_figure(folder):
    page = run_page(read_run(folder))
    assert [section.title for section in page.sections] == [
        "Slimming",
        "Quality",
        "Experts",
        "Time",
        "Exchange",
        "Health",
        "The run",
    ]
    figures = {figure.label: figure.value for figure in page.figures}
    rows, _ = logged(folder)
    seconds = sum(10 * row["step_ms"] for row in rows) / 1e3
    assert figures == {
        "State": "complete",
        "Bits per symbol": "2.270",
        "Symbols per second": f"{400 * 1024 / seconds:,.0f}",
        "Training time": f"{seconds:.3g} s",
        "Active experts k": "4",
        "Training arithmetic": "4.8 TFLOP",
        "Model FLOPs utilisation": "21.0%",
        "Peak memory": "900 MB",
        "Bytes on the wire": f"{sum(row['wire_bytes'] for row in rows) / 40e6:.2f} MB",
    }
    assert "Missing in this folder" not in words(page)


def quality(page, choice, title="Bits per symbol"):
    """The chart that is shown when its quantity is chosen."""
    (found,) = [
        part
        for section in page.sections
        for part in section.parts
        if isinstance(part, Curve) and (part.title, part.choice) == (title, choice)
    ]
    return found


@pytest.mark.parametrize(("choice", "x"), [("symbols", "tokens"), ("FLOP", "flops")])
def test_quality_is_what_was_logged_and_the_test_split_at_its_end(folder, choice, x):
    chart = quality(run_page(read_run(folder)), choice)
    rows, valid = logged(folder)
    assert (line(chart, "test split, k = 4").x, line(chart, "test split, k = 4").y) == ([rows[-1][x]], [2.27])
    for name, found, value in (("training", rows, "bpc"), ("validation", valid, "valid_bpc")):
        assert line(chart, name).x == [row[x] for row in found]
        assert line(chart, name).y == [row[value] for row in found]


def test_seconds_are_those_of_the_steps(folder):
    chart = quality(run_page(read_run(folder)), "time")
    rows, _ = logged(folder)
    assert np.allclose(line(chart, "training").x, np.cumsum([10 * row["step_ms"] / 1e3 for row in rows]))
    places = dict(zip([row["step"] for row in rows], line(chart, "training").x, strict=True))
    assert line(chart, "validation").x == [places[step] for step in (100, 200, 300, 400)]


def test_slimming_is_the_summary_with_what_counting_gets(folder):
    charts = parts(run_page(read_run(folder)), Curve)
    summary = json.loads((folder / "summary.json").read_text())
    over_k = charts["Bits per symbol over k"]
    assert dict(zip(over_k.lines[0].x, over_k.lines[0].y, strict=True)) == {
        int(k): bpc for k, bpc in summary["bpc"].items()
    }
    assert {each.name: each.y[0] for each in over_k.lines[1:]} == {"order 2": 2.7, "order 3": 2.15, "bzip2 -9": 1.57}
    assert charts["Bits per symbol over inference arithmetic"].lines[0].x == [2e6, 3e6, 5e6, 9e6]


def test_heat_maps_are_rows_over_the_mean(folder):
    maps = parts(run_page(read_run(folder)), HeatMap)
    assert list(maps) == [f"Layer {layer}: load of the experts" for layer in range(LAYERS)]
    rows, _ = logged(folder)
    for layer, chart in enumerate(maps.values()):
        assert chart.x == [row["step"] for row in rows] and len(chart.rows) == EXPERTS
        for column, row in enumerate(rows):
            mean = sum(row["expert_rows"][layer]) / EXPERTS
            for expert in range(EXPERTS):
                assert isclose(chart.values[expert][column], row["expert_rows"][layer][expert] / mean, rel_tol=1e-5)
        assert chart.middle == 1 and chart.ends == next(iter(maps.values())).ends


def test_parts_of_a_step_add_up_to_it(folder):
    chart = parts(run_page(read_run(folder)), Areas)["Time of a step"]
    rows, _ = logged(folder)
    assert np.allclose(np.sum([each.y for each in chart.lines], 0), [row["step_ms"] for row in rows])
    assert line(chart, "experts").y == [row["experts_ms"] for row in rows]
    assert not np.allclose(np.sum([each.y for each in chart.lines[1:]], 0), [row["step_ms"] for row in rows])
    table = parts(run_page(read_run(folder)), Table)["Mean time of a step"]
    mean = sum(row["step_ms"] for row in rows) / len(rows)
    assert table.rows[0] == ["whole step", f"{mean:.2f}", "100.0%"]


def test_bytes_stand_beside_the_certificate(folder, copied):
    page = run_page(read_run(folder))
    bars = parts(page, Bars)["Bytes against the certificate"]
    rows, _ = logged(folder)
    assert bars.groups == ["1", "2", "3", "4"] and [bar.name for bar in bars.bars] == ["logged", "certified"]
    for i, k in enumerate((1, 2, 3, 4)):
        sent = [row["wire_bytes"] for row in rows if row["k"] == k]
        assert isclose(bars.bars[0].parts[0][i], sum(sent) / len(sent) / 1e6)
        assert isclose(bars.bars[1].parts[0][i], 2.0 * k)
    (verdict,) = parts(page, Verdict).values()
    assert verdict.good and "certificates/run" in verdict.text
    (copied / "state.json").write_text('{"state": "failed", "step": 400}')
    (verdict,) = parts(run_page(read_run(copied)), Verdict).values()
    assert not verdict.good and "failed" in verdict.text


def test_ranks_have_lines_or_when_many_a_heat_map_and_a_spread(folder, tmp_path):
    title = "Each rank's own time in forward passes"
    rows, _ = logged(folder)
    chart = parts(run_page(read_run(folder)), Curve)[title]
    assert len(chart.lines) == RANKS
    assert np.allclose(chart.lines[2].y, [row["rank_own_ms"][2] for row in rows], rtol=1e-6)
    many = write_run(tmp_path / "many", lines=5, ranks=40, layers=9)
    page = run_page(read_run(many))
    assert len(parts(page, HeatMap)[title].rows) == 40
    assert len(parts(page, HeatMap)["Busiest expert of each layer"].rows) == 9
    own = np.mean([row["rank_own_ms"] for row in logged(many)[0]], 0)
    table = parts(page, Table)["Means of 40 ranks, in one step"]
    assert [row[1] for row in table.rows] == [
        f"{own.min():.4g}",
        f"{own.mean():.4g}",
        f"{own.max():.4g}",
        str(own.argmax()),
    ]


def test_long_series_are_thinned_by_means():
    lines = [{"step": step, "loss": float(step % 7)} for step in range(1, 10 * POINTS + 4)]
    found = metric_series(lines, "loss")
    assert len(found.x) <= POINTS and found.lines == 11
    assert found.mean[3] == sum(step % 7 for step in range(34, 45)) / 11 and found.most[3] == 6
    assert found.x[3] == 39
    last = [step % 7 for step in range(11 * (len(found.x) - 1) + 1, 10 * POINTS + 4)]
    assert found.mean[-1] == sum(last) / len(last)
    assert all(before < after for before, after in pairwise(found.x))


def test_gaps_stay_gaps():
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 3},
        {"step": 4, "loss": True},
        {"step": 5, "loss": 1.0},
    ]
    found = metric_series(lines, "loss")
    assert found.mean[0] == 2 and all(map(isnan, found.mean[1:4])) and found.mean[4] == 1
    assert metric_series(lines, "grad_norm").x == [] and metric_series(lines, "loss", "tokens").x == []


def test_a_long_run_gives_a_small_page(tmp_path):
    from plotly.offline import get_plotlyjs

    from foreroute.launch.page.html_file import html

    run = read_run(write_run(tmp_path / "long", lines=1500, layers=6, experts=64))
    assert len(run.lines) == 1500
    assert all(len(each.x) <= POINTS for chart in parts(run_page(run), Curve | Areas).values() for each in chart.lines)
    assert metric_grid(run, "expert_rows", 2).values.size < 42_000
    assert len(html(run_page(run))) - len(get_plotlyjs()) < 1_000_000


@pytest.mark.parametrize("missing", ["config.yaml", "facts.json", "summary.json", "state.json", "metrics.jsonl"])
@pytest.mark.parametrize("how", ["gone", "damaged", "other"])
def test_a_page_says_what_is_missing(copied, missing, how):
    file = copied / missing
    if how == "gone":
        file.unlink()
    else:
        file.write_text('{"a": [' if how == "damaged" else '[["x", 1]]')
    page = run_page(read_run(copied))
    if how == "damaged" or (how, missing) == ("gone", "metrics.jsonl") or how == "gone":
        assert missing in words(page)
    assert page.sections[-1].title == "The run"


def test_a_line_that_is_being_written_is_left_out(copied):
    whole = run_page(read_run(copied))
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 410, "loss": 1.2')
    cut = run_page(read_run(copied))
    assert "1 line of metrics.jsonl (cut short)" in words(cut)
    assert parts(cut, Chart) == parts(whole, Chart)


def test_a_run_of_an_earlier_version_gives_what_it_has(copied):
    """The names of the first version, whose validations knew no arithmetic."""
    new = (
        "flops",
        "data_ms",
        "metric_ms",
        "active_parameters",
        "wire_bytes_inside",
        "wire_bytes_between",
        "layer_load",
        "expert_rows",
        "rank_load_max_over_mean",
    )
    rows = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    old = [
        {
            name: value
            for name, value in row.items()
            if name == "rank_skew" or not (name in new or name.startswith("rank_"))
        }
        for row in rows
    ]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    (copied / "facts.json").unlink()
    page = run_page(read_run(copied))
    text = words(page)
    assert "facts.json, the metric flops, the metric layer_load, the metric rank_own_ms" in text
    assert "Not over training arithmetic" in text
    titles = set(parts(page, Chart))
    assert {"Bits per symbol", "Time of a step", "Bytes on the wire", "Bits per symbol over k"} <= titles
    assert [chart.choice for chart in page.sections[1].parts if isinstance(chart, Curve)][:2] == ["symbols", "time"]
    assert not any("arithmetic" in title or "load of the experts" in title for title in titles)


@pytest.mark.parametrize("value", [None, 3, "x", [], [None, 1], [[1, 2], [3]], [[None, 1], [2, 3]], {"a": 1}])
def test_strange_values_do_no_harm(tmp_path, value):
    copied = write_run(tmp_path / "short", lines=3)
    rows = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in rows[0] if name != "step"]
    facts = json.loads((copied / "facts.json").read_text())
    for start, every in ((0, 1), (0, 2), (1, 2)):  # all, and so that each stands beside a good one
        changed = [row | dict.fromkeys(names[start::every], value) for row in rows]
        (copied / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        strange = facts | dict.fromkeys(list(facts)[start::every], value)
        (copied / "facts.json").write_text(json.dumps(strange))
        found = read_run(copied)
        assert run_page(found).sections[-1].title == "The run"
        assert several_page("two", [found, found]).sections[0].title == "Runs"


def test_lines_of_another_number_of_ranks_are_left_out(copied):
    rows = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    rows[0]["rank_own_ms"] = [1.0, 2.0]
    (copied / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = metric_grid(read_run(copied), "rank_own_ms", 1)
    assert found.values.shape == (39, RANKS) and found.steps[0] == 20


def test_options_that_differ_from_the_defaults(folder):
    found = changed_options(read_run(folder))
    assert found["moe.experts"] == (8, Config().moe.experts) and found["eval.k"][0] == [1, 2, 4, 8]
    assert "optim.beta1" not in found


def test_what_a_machine_was_measured_to_be_is_a_fact_and_no_option(folder, copied):
    runs = [read_run(folder), read_run(copied)]
    for run, first in zip(runs, (3, 99), strict=True):
        run.options["kernels.masked_from_k"] = first
    facts = [dict(parts(run_page(run), Table)[""].rows) for run in runs]
    assert facts[0]["measured at the start"] == "masked products from k = 3 on"
    assert "measured at the start" not in facts[1]  # never, of 8 experts
    assert "kernels.masked_from_k" not in {**changed_options(runs[0]), **changed_options(runs[1])}
    assert "masked" not in words(several_page("two", runs))


def test_one_rank_has_no_chart_of_ranks(tmp_path):
    """All that it has is what is shown of all ranks."""
    row = {"rank_load_max_over_mean": 1.0, "rank_skew": 1.0, "link_bytes": []}
    zero = ("wire_bytes", "wire_bytes_inside", "wire_bytes_between", "exchange_exposed_ms", "exchange_hidden_ms")
    alone = write_run(tmp_path / "alone", lines=12, ranks=1)
    rows = [
        json.loads(line) | row | dict.fromkeys(zero, 0) for line in (alone / "metrics.jsonl").read_text().splitlines()
    ]
    (alone / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    others = write_run(tmp_path / "two", lines=12, ranks=2), write_run(tmp_path / "deep", lines=12, ranks=1, layers=8)
    page, two, deep = (run_page(read_run(each)) for each in (alone, *others))
    charts = parts(page, Chart)
    assert "Exchange" not in {section.title for section in page.sections}
    assert not any(word in title for title in charts for word in ("each rank", "Each rank", "between ranks", "Slowest"))
    assert "Busiest expert of each layer" in charts and "Busiest over the mean" not in charts  # the worst of its lines
    assert {"Busiest over the mean"} <= set(parts(two, Chart)) & set(parts(deep, Chart))
    times = [{row[0] for row in parts(each, Table)["Mean time of a step"].rows} for each in (page, two)]
    assert times[1] - times[0] == {
        "forward, without waiting for other ranks",
        "exchange, exposed (in forward and backward)",
        "exchange, hidden",
    }
    assert {"Rows that each rank computes", "Exchange between ranks"} <= set(parts(two, Chart))  # negative control


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Eight runs, the later the worse; the last two are cut short."""
    runs = tmp_path_factory.mktemp("sweep")
    for i in range(8):
        state = "complete" if i < 6 else "failed"
        write_run(runs / f"g-{i}", lines=12, seed=i, lr=1e-3 * (i + 1), state=state)
    listed = [{"name": f"g-{i}", "options": {}, "state": "complete"} for i in range(8)]
    listed.append({"name": "g-8", "options": {}, "state": "not started"})
    (runs / "g.sweep.json").write_text(json.dumps({"runs": listed}))
    return runs


def test_a_table_has_all_runs_and_charts_the_best_six(sweep):
    runs = [read_run(sweep / f"g-{i}") for i in (7, 3, 0, 1, 6, 2, 4, 5)]
    page = several_page("Sweep g", runs, [Absent("g-8", "not started")])
    assert page.lead.startswith(
        "9 runs: 6 complete, 2 failed, 1 not started. Charts show the best 6 of 8, the table all."
    )
    header, rows = page.sections[0].parts[0].header, page.sections[0].parts[0].rows
    assert list(header)[:3] == ["run", "bpc", "optim.lr"] and header[-1] == "state"
    assert [row[0] for row in rows][:6] == [f"g-{i}" for i in range(6)]
    assert {row[0] for row in rows[6:8]} == {"g-6", "g-7"}
    assert rows[8] == ["g-8", *["-"] * (len(header) - 2), "not started"]
    column = dict(zip(header, rows[1], strict=True))
    assert (column["optim.lr"], column["bpc"], column["k = 1"], column["of"]) == (
        "0.002",
        "2.280",
        "2.690",
        "test split, k = 4",
    )
    assert (column["parameters"], column["active"], column["state"]) == ("3.44 M", "1.6 M", "complete")
    assert [name for name in header if "." in name] == ["optim.lr"]
    for chart in parts(page, Curve).values():
        assert [each.name for each in chart.lines] == [f"g-{i}" for i in range(6)]


def test_a_run_keeps_its_colour_where_others_have_no_line(sweep):
    runs = [read_run(sweep / "g-7"), read_run(sweep / "g-0"), read_run(sweep / "g-1")]
    (sweep / "g-7/summary.json").unlink(missing_ok=True)
    bare = write_run(sweep / "bare", lines=12, seed=0, lr=0.5)
    rows, _ = logged(bare)
    (bare / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = several_page("three", [*runs, read_run(bare)])
    hues = {}
    for chart in parts(page, Curve).values():
        for each in chart.lines:
            assert hues.setdefault(each.name, each.hue) == each.hue
    assert sorted(hues.values()) == [0, 1, 2, 3]
    validation = quality(page, "symbols", "Validation: bits per symbol")
    assert len(validation.lines) == 3 and [each.hue for each in validation.lines] != [0, 1, 2]


def test_runs_of_different_texts_are_not_compared_silently(sweep, tmp_path):
    other = shutil.copytree(sweep / "g-1", tmp_path / "g-1")
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps({**summary, "corpus_sha256": "f" * 64}))
    page = several_page("two", [read_run(sweep / "g-0"), read_run(other)])
    assert "not comparable" in words(page)
    assert "not comparable" not in words(several_page("two", [read_run(sweep / f"g-{i}") for i in (0, 1)]))


def test_the_program_writes_one_file_beside_what_was_asked_for(run, folder, copied, sweep):
    done = run("report", f"run={copied}")
    assert done.returncode == 0 and done.stdout.startswith(f"written: {copied}/report.html (")
    first = (copied / "report.html").read_text()
    assert "Run whole" in first and first.isascii()
    assert sorted({path.name for path in copied.iterdir()} - {path.name for path in folder.iterdir()}) == [
        "report.html"
    ]
    assert run("report", f"run={copied}").returncode == 0  # over its own
    for asked in ("g", "g.sweep.json"):
        assert run("report", f"run={sweep}/{asked}").stdout.startswith(f"written: {sweep}/g.report.html")
    assert "Sweep g" in (sweep / "g.report.html").read_text()
    done = run("report", f"run=[{sweep}/g-0,{sweep}/g-1]", f"out={copied}/two.html")
    assert done.returncode == 0 and "Comparison of runs" in (copied / "two.html").read_text()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["run={tmp}/nothing"], "run={tmp}/nothing: no such folder"),
        (["run={tmp}"], "run={tmp}: is no run folder, it holds none of config.yaml, metrics.jsonl, state.json"),
        (["run=[]"], "run=[]: must be a folder of a run, or a list of such folders"),
        (["run=3"], "run=3: no such folder"),
        (["run=[{tmp}/a,{tmp}/a]"], "run=['{tmp}/a', '{tmp}/a']: names a run twice"),
        (["run={tmp}/x.sweep.json"], "run={tmp}/x.sweep.json: no such file"),
        (["run={tmp}/bad.sweep.json"], "run={tmp}/bad.sweep.json: is no file of a sweep: it lists no runs"),
        (["run={run}", "out={tmp}"], "out={tmp}: is a folder; must be a file"),
        (
            ["run={run}", "out={tmp}/bad.sweep.json"],
            "out={tmp}/bad.sweep.json: exists, and is no report that launch.report wrote",
        ),
        (["run={run}", "out={tmp}/no/x.html"], "out={tmp}/no/x.html: {tmp}/no is not a folder that can be written to"),
    ],
)
def test_bad_input_is_one_line(run, folder, tmp_path, asked, words):
    bad = tmp_path / "bad.sweep.json"
    bad.write_text('{"runs": [1]}')
    found = run("report", *(option.format(tmp=tmp_path, run=folder) for option in asked))
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"foreroute: {words.format(tmp=tmp_path, run=folder)}\n"
    assert bad.read_text() == '{"runs": [1]}'


def test_a_run_names_the_command_that_works(run, tmp_path):
    """Also with an = in its folder's name, as in a sweep."""
    options = [
        *small_run(tmp_path),
        "train.steps=4",
        "train.log_every=1",
        f"train.runs_dir={tmp_path}",
        "train.name='a=1'",
    ]
    done = run("train", *options)
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    assert command.startswith("python -m launch.report ") and command.endswith(" makes a page of it")
    asked = shlex.split(command)[3]
    assert asked == f"run='{tmp_path}/a=1'" and run("report", asked).returncode == 0
    page = run_page(read_run(tmp_path / "a=1"))
    rows, _ = logged(tmp_path / "a=1")
    assert quality(page, "symbols").lines[0].y == [row["bpc"] for row in rows]
    assert {"Quality", "Slimming", "Time", "Health", "The run"} <= {section.title for section in page.sections}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (nan, "-"),
        (0.5, "0.5 s"),
        (99.96, "1 min 40 s"),
        (100, "1 min 40 s"),
        (3600, "1 h 00 min"),
        (4020, "1 h 07 min"),
        (86_400, "1 d 00 h"),
    ],
)
def test_durations(value, text):
    assert duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(nan, "-"), (0, "0"), (999, "999"), (999.6, "1 k"), (3_444_992, "3.44 M"), (1e15, "1 P"), (999_999, "1 M")],
)
def test_counts(value, text):
    assert count_text(value) == text


def test_many_options_stand_behind_the_results(sweep, tmp_path):
    runs = [read_run(shutil.copytree(sweep / f"g-{i}", tmp_path / f"r{i}")) for i in (0, 1)]
    for name in ("model.width", "model.heads", "moe.ngram", "moe.rows"):
        runs[0].options[name] = 1
    page = several_page("two", runs)
    table = page.sections[0].parts[0]
    assert list(table.header)[:3] == ["run", "bpc", "k = 1"]
    assert list(table.header)[-6:] == ["active", "model.width", "model.heads", "moe.ngram", "moe.rows", "optim.lr"]
    assert {each.name for chart in parts(page, Curve).values() for each in chart.lines} == {"r0", "r1"}


def test_a_dense_run_is_a_point_among_the_others(sweep, tmp_path):
    dense = shutil.copytree(sweep / "g-0", tmp_path / "dense")
    summary = json.loads((dense / "summary.json").read_text())
    (dense / "summary.json").write_text(json.dumps({**summary, "bpc": {"dense": 2.4}}))
    facts = json.loads((dense / "facts.json").read_text())
    (dense / "facts.json").write_text(
        json.dumps({**facts, "flops_per_symbol": {"dense": 8e6}, "active_parameters": {"dense": 3_444_992}})
    )
    page = several_page("two", [read_run(dense), read_run(sweep / "g-1")])
    chart = parts(page, Curve)["Bits per symbol over inference arithmetic"]
    assert line(chart, "dense").x == [8e6] and line(chart, "dense").y == [2.4]
    assert [each.name for each in parts(page, Curve)["Bits per symbol over k"].lines] == ["g-1"]
    row = dict(zip(page.sections[0].parts[0].header, page.sections[0].parts[0].rows[1], strict=True))
    assert (row["active"], row["k = 1"]) == ("3.44 M", "-") and not {"of", "state"} & set(row)  # all whole
    titles = {section.title: section for section in run_page(read_run(dense)).sections}
    assert [type(part) for part in titles["Slimming"].parts] == [str, Table]
