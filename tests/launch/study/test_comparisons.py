"""Comparisons of arms against plain numbers, what may be claimed of them, and which runs must not be paired."""

import json
from dataclasses import replace

import pytest

from foreroute.engine.errors import UserError
from foreroute.launch.study.comparisons import as_json, compare_along, comparisons, mean_curve, missing, pairs_of, ratio
from foreroute.launch.study.comparisons import compare_on_test as on_test
from foreroute.launch.study.preset import ArmConfig, Preset
from foreroute.launch.study.results import arrange, best_rate, curve, read_results
from foreroute.launch.study.study_page import change, study_page
from foreroute.launch.study.write import write_report
from foreroute.launch.testing.runs import study_result

PRESET = Preset(
    {"dense": ArmConfig(kin="dense"), "hashed": ArmConfig(), "frozen": ArmConfig()}, pairs=[["hashed", "frozen"]]
)
SHIFT = {1: 0.5, 2: -0.3, 3: 0.1}  # of a seed, shared by its arms


def dense(seed, **changes):
    """Points at 100, 200, 400 symbols; 10 FLOPs and 1 s per 100 symbols."""
    s = SHIFT[seed]
    points = [(100, 10, 1, 4 + s), (200, 20, 2, 3 + s), (400, 40, 4, 2 + s)]
    return study_result("dense", seed, points, {"dense": 2 + s}, **changes)


def hashed(seed, **changes):
    """Half the FLOPs and, for a symbol, twice the time of dense; 0.1 better, give or take 0.01 by seed."""
    s = SHIFT[seed] - 0.1 + 0.01 * (seed - 2)
    points = [(100, 5, 2, 4 + s), (200, 10, 4, 3 + s), (400, 20, 8, 2 + s)]
    return study_result("hashed", seed, points, {"1": 2.5 + s, "2": 2 + s, "4": 2.2 + s}, **changes)


def all_of(*makers, seeds=(1, 2, 3)):
    return arrange([make(seed) for make in makers for seed in seeds])


def test_on_the_test_split_at_each_k():
    results = all_of(dense, hashed)
    found = on_test(results, "hashed", "dense", None)
    assert found.difference.mean == pytest.approx(-0.1) and found.difference.n == 3
    half = 4.302652729749462 * 0.01 / 3**0.5
    assert found.difference.high == pytest.approx(-0.1 + half)
    assert found.relative == pytest.approx(-0.1 / (2 + 0.1))  # mean of dense: 2 + (0.5 - 0.3 + 0.1) / 3
    assert on_test(results, "hashed", "dense", 1).difference.mean == pytest.approx(0.4)
    assert on_test(results, "hashed", "dense", 8) is None  # hashed was not evaluated there
    assert on_test(results, "hashed", "frozen", None) is None


def test_at_equal_tokens_at_three_points():
    results = all_of(dense, hashed)
    for share in (0.25, 0.5, 1.0):
        found = compare_along(results, "hashed", "dense", "symbols", share)
        assert found.difference.mean == pytest.approx(-0.1) and not found.cut
    assert "25% of equal tokens" in compare_along(results, "hashed", "dense", "symbols", 0.25).at


def test_at_equal_flops_the_dearer_arm_is_read_in_the_middle():
    """hashed ends with 20 FLOPs, where dense, after 200 of its 400 symbols, was at 3."""
    results = all_of(dense, hashed)
    found = compare_along(results, "hashed", "dense", "flops")
    assert found.difference.mean == pytest.approx((2 - 0.1) - 3)
    assert found.cut == "dense was read at 50% of its training"
    half = compare_along(results, "hashed", "dense", "flops", 0.5)  # at 10: 3 - 0.1 against 4
    assert half.difference.mean == pytest.approx((3 - 0.1) - 4)
    assert half.cut == "dense was read at 25% of its training"


def test_of_an_arm_in_mid_schedule_nothing_is_claimed():
    """The interval excludes 0 by far; at equal tokens the same pair may be claimed."""
    found = compare_along(all_of(dense, hashed), "hashed", "dense", "flops")
    assert found.difference.sign == -1
    assert found.claim == "none: no fair comparison"
    assert change(found).startswith("-1.1000") and change(found).endswith(" *")
    fair = compare_along(all_of(dense, hashed), "hashed", "dense", "symbols")
    assert fair.claim == "4.8% below" and not change(fair).endswith("*")


def test_one_seed_that_was_read_early_is_enough_to_claim_nothing():
    """hashed of seed 3 is slower: when dense has used 8 s of time it stands at 7/8 of its training; the mean is 96%."""

    def long_dense(seed):
        found = dense(seed)
        for point in found["curve"]:
            point["seconds"] *= 2
        return found

    def uneven(seed):
        found = hashed(seed)
        for point in found["curve"]:
            point["seconds"] *= 8 / 7 if seed == 3 else 1
        return found

    fair = compare_along(all_of(long_dense, hashed), "hashed", "dense", "seconds")
    assert not fair.cut
    found = compare_along(all_of(long_dense, uneven), "hashed", "dense", "seconds")
    assert found.cut == "hashed was read at 88% of its training"


def dense_short(seed):
    """Dense with the FLOPs of hashed, in a whole schedule."""
    s = SHIFT[seed]
    return study_result("dense_short", seed, [(100, 10, 1, 4 + s), (200, 20, 2, 2.5 + s)], {"dense": 2.5 + s})


def test_headline_figures_are_of_fair_pairs():
    arms = {**PRESET.arms, "dense_short": ArmConfig()}
    preset = Preset(arms, pairs=[["hashed", "dense"], ["hashed", "dense_short"]])
    page = study_page("x", preset, all_of(dense, hashed, dense_short))
    runs, tokens, flops, seconds = page.figures
    assert runs.value == "9 of 12"
    assert (tokens.value, tokens.note.split(",")[0]) == ("-0.1000", "hashed minus dense")
    assert (flops.value, flops.note.split(",")[0]) == ("-0.6000", "hashed minus dense_short")
    assert (seconds.value, seconds.note) == ("-", "no fair pair")
    claims = next(section.parts[0] for section in page.sections if section.title.startswith("What the intervals"))
    assert [[row[i] for i in (0, 1, 2, 4, 5, 6, 7)] for row in claims.rows] == [
        ["hashed", "dense", "4.8% below", "test, own k", "3", "0.50", "2.00"],
        ["hashed", "dense_short", "23.1% below", "test, own k", "3", "1.00", "4.00"],
        ["hashed", "dense_short", "23.1% below", "valid, equal training FLOPs", "3", "1.00", "4.00"],
    ]


def test_the_page_begins_with_the_main_arms():
    """Means of three seeds, shifted by 0.1: over k where no run knows its arithmetic, else over that."""
    preset = replace(PRESET, lead={"hashed": "Hashed, k = 4", "dense": "Dense", "frozen": "not run"})
    chart, _ = study_page("x", preset, all_of(dense, hashed)).sections[0].parts
    assert [line.name for line in chart.lines] == ["Hashed, k = 4", "Dense"] and chart.x_log
    of_hashed, of_dense = chart.lines
    assert of_hashed.x == of_dense.x == [1, 2, 4]
    assert of_hashed.y == pytest.approx([2.5, 2.0, 2.2]) and of_dense.y == pytest.approx([2.1] * 3)
    runs = [
        *(dense(seed, flops_per_symbol={"dense": 8e6}) for seed in SHIFT),
        *(hashed(seed, flops_per_symbol={"1": 2e6, "2": 3e6, "4": 5e6}) for seed in SHIFT),
    ]
    of_hashed, of_dense = study_page("x", preset, arrange(runs)).sections[0].parts[0].lines
    assert of_hashed.x == [2, 3, 5] and of_hashed.y == pytest.approx([2.5, 2.0, 2.2])
    assert of_dense.x == [8] and of_dense.y == pytest.approx([2.1])
    many = replace(PRESET, arms={f"a{i}": ArmConfig(kin="a0") for i in range(7)} | PRESET.arms)
    assert study_page("x", many, all_of(dense, hashed)).sections[0].title == "What was run"  # nobody said which


def test_at_equal_seconds_between_two_points():
    """dense ends after 4 s, where hashed was at 3; at 75% of that, 3 s: between its points of 2 s and 4 s, at 3.5."""
    results = all_of(dense, hashed)
    found = compare_along(results, "hashed", "dense", "seconds")
    assert found.difference.mean == pytest.approx((3 - 0.1) - 2)
    assert found.cut == "hashed was read at 50% of its training"
    between = compare_along(results, "hashed", "dense", "seconds", 0.75)
    assert between.difference.mean == pytest.approx((3.5 - 0.1) - 2.5)
    before = compare_along(results, "hashed", "dense", "seconds", 0.25)
    assert before is None  # at 1 s hashed had no point yet: nothing is made up


def test_flops_that_were_not_recorded_give_nothing():
    without = dense(1)
    for point in without["curve"]:
        point["flops"] = None
    results = arrange([without, hashed(1)])
    assert compare_along(results, "hashed", "dense", "flops") is None
    assert ratio(results, "hashed", "dense", "flops") is None
    assert mean_curve(results, "dense", "flops") == []
    assert compare_along(results, "hashed", "dense", "symbols") is not None


def test_ratios_and_mean_curves():
    results = all_of(dense, hashed)
    assert ratio(results, "hashed", "dense", "seconds").mean == 2
    assert ratio(results, "hashed", "dense", "flops").mean == 0.5
    assert mean_curve(results, "dense", "symbols") == [
        (100, pytest.approx(4.1)),
        (200, pytest.approx(3.1)),
        (400, pytest.approx(2.1)),
    ]


def test_a_percentage_only_where_the_interval_excludes_0():
    shown = on_test(all_of(dense, hashed), "hashed", "dense", None)
    assert (shown.claim, change(shown)) == ("4.8% below", "-0.1000 [-0.1248, -0.0752]")
    assert on_test(all_of(dense, hashed), "dense", "hashed", None).claim == "5.0% above"

    def noisy(seed):
        found = hashed(seed)
        found["bpc"]["2"] += {1: 0.3, 2: -0.3, 3: 0.05}[seed]
        return found

    assert on_test(all_of(dense, noisy), "hashed", "dense", None).claim == "no difference is shown"
    alone = on_test(all_of(dense, hashed, seeds=(1,)), "hashed", "dense", None)
    assert alone.claim == "none: one seed has no interval"


def test_pairs_are_by_seed():
    """Another seed's run of dense changes nothing: only seeds that both have are compared."""
    results = arrange([dense(1), dense(2), dense(3), hashed(2), hashed(3)])
    found = on_test(results, "hashed", "dense", None)
    assert found.difference.n == 2 and found.difference.mean == pytest.approx(-0.095)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corpus_sha256": "cd" * 32}, "corpus_sha256=cdcd"),
        ({"tokens": "txl"}, "tokens=txl"),
        ({"test_symbols": 499}, "test_symbols=499"),
        ({"options": {**hashed(1)["options"], "data.start": 0.7}}, "data.start=0.7"),
        ({"options": {**hashed(1)["options"], "data.segment": 64}}, "data.segment=64"),
    ],
)
def test_runs_on_other_text_or_in_another_order_are_not_paired(changes, words):
    with pytest.raises(UserError) as error:
        arrange([hashed(1, **changes), dense(1)])
    assert words in str(error.value) and "seed 1" in str(error.value)
    arrange([hashed(1), dense(1)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"learning_rate": 0.004}, "learning_rate=0.002, seed 2 has 0.004"), ({"steps": 9}, "steps=3, seed 2 has 9")],
)
def test_seeds_of_an_arm_that_are_not_alike_are_refused(changes, words):
    with pytest.raises(UserError) as error:
        arrange([dense(1), hashed(1), hashed(2, **changes)])
    assert str(error.value).startswith("hashed: seed 1 has ") and words in str(error.value)
    assert "\n" not in str(error.value)
    arrange([dense(1), hashed(1, **changes)])  # another arm may differ


def test_the_page_lists_the_commits():
    def page_of(*codes):
        runs = [dense(seed, code=code) for seed, code in enumerate(codes, 1)]
        rows = study_page("x", PRESET, arrange(runs)).sections[0].parts[0].rows
        return dict(rows)["Code"]

    one, other = ({"commit": letter * 40, "changed": False} for letter in "ab")
    assert page_of(one, one) == "a" * 12
    assert (
        page_of(one, {**other, "changed": True}, None)
        == f"3 commits: {'a' * 12}; {'b' * 12}, with files changed since; commit unknown"
    )


def test_only_what_is_there_is_compared():
    results = all_of(dense, hashed, seeds=(1, 2))
    assert pairs_of(PRESET, results) == [("hashed", "dense")]
    assert missing(PRESET, results) == ["dense-seed3", "hashed-seed3", *(f"frozen-seed{n}" for n in (1, 2, 3))]
    assert {(c.a, c.b) for c in comparisons(PRESET, results)} == {("hashed", "dense")}
    found = as_json("x", PRESET, results)
    assert list(found["arms"]) == ["dense", "hashed"]
    assert found["arms"]["hashed"]["2"]["mean"] == pytest.approx(2 - 0.005)
    assert found["arms"]["hashed"]["own k"] == found["arms"]["hashed"]["2"]
    assert len(found["results"]) == 4


def test_the_best_rate_is_that_of_the_lowest_bpc_on_the_valid_split():
    def tried(arm, rate, bpc):
        return study_result(arm, 0, [(1, 1, 1, 9)], bpc, tries=rate, split="valid")

    results = [
        tried("dense", 0.1, {"dense": 3}),
        tried("dense", 0.2, {"dense": 2}),
        tried("hashed", 0.1, {"2": 1.5, "4": 9}),
        tried("hashed", 0.2, {"2": 1.6, "4": 1}),
        dense(1),
    ]
    assert (best_rate(results, "dense"), best_rate(results, "hashed")) == (0.2, 0.1)
    assert best_rate(results, "frozen") is None


@pytest.mark.parametrize(
    ("more", "seconds"),
    [
        ({}, (2.5, 3.0)),
        ({"processor_ms": 100.0}, (0.3, 0.4)),
        ({"processor_ms": 100.0, "peak_device_memory_bytes": 0}, (0.3, 0.4)),
        ({"processor_ms": 100.0, "peak_device_memory_bytes": 7}, (2.5, 3.0)),  # on a GPU
    ],
)
def test_a_curve_from_the_lines_of_a_run(more, seconds):
    """Seconds are milliseconds times the steps since the last line; a validation between two lines is read between
    them."""
    rows = [
        {"step": 2, "step_ms": 1000.0, "tokens": 20, **more},
        {"step": 3, "valid_bpc": 5.0, "tokens": 30, "flops": 7.0, "k": 2},
        {"step": 4, "step_ms": 500.0, "tokens": 40, **more},
        {"step": 4, "valid_bpc": 4.0, "tokens": 40, "flops": 9.0, "k": 2},
        {"step": 5, "valid_bpc": None, "tokens": 50},
    ]
    found = curve(rows)
    assert [point.pop("seconds") for point in found] == pytest.approx(seconds)
    assert found == [
        {"step": 3, "symbols": 30, "flops": 7.0, "valid_bpc": 5.0},
        {"step": 4, "symbols": 40, "flops": 9.0, "valid_bpc": 4.0},
    ]


def write(folder, results):
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        (folder / f"{result['arm']}-seed{result['seed']}.json").write_text(json.dumps(result))


def test_a_report_of_a_part_and_again_from_the_repository_alone(tmp_path):
    folder, docs = tmp_path / "study/results", tmp_path / "docs"
    write(folder, [dense(1), dense(2), hashed(1), hashed(2)])
    docs.mkdir()
    (docs / "x_discussion.md").write_text("Written **by hand**.\n\n* *One* [page](a.md)\n* two\n")
    files = write_report("x", PRESET, folder, docs)
    assert all(path.exists() for path in files)
    text = (docs / "x.md").read_text()
    assert "Missing: 5 of 9 runs (dense-seed3, hashed-seed3, frozen-seed1, frozen-seed2, frozen-seed3)" in text
    assert "Written **by hand**." in text and "No seed of both is there: hashed and frozen." in text
    for picture in docs.glob("*.svg"):
        assert f"({picture.name})" in text
    shown = (tmp_path / "study/x.html").read_text()
    assert shown.startswith("<!doctype html>")
    for paragraph in ("Written by hand.", "One page", "two"):
        assert f">{paragraph}</p>" in shown
    found = json.loads((docs / "x.json").read_text())
    assert found["arms"]["hashed"]["2"]["n"] == 2 and len(found["results"]) == 4

    before = {path.name: path.read_bytes() for path in docs.iterdir()}
    write_report("x", PRESET, tmp_path / "nowhere", docs)
    assert before == {path.name: path.read_bytes() for path in docs.iterdir()}
    (folder / "dense-seed1.json").write_text("{")
    with pytest.raises(UserError, match="dense-seed1"):
        write_report("x", PRESET, folder, docs)


def test_the_page_says_which_rates_were_tried_and_taken(tmp_path):
    tuning = [
        study_result("hashed", 0, [(1, 1, 1, 9)], {"2": bpc}, tries=rate, split="valid")
        for rate, bpc in ((0.1, 3.0), (0.2, 2.0), (0.4, 2.5))
    ]
    folder = tmp_path / "results"
    write(folder, [dense(1), hashed(1)])
    for result in tuning:
        (folder / f"tune-{result['tries']}.json").write_text(json.dumps(result))
    write_report("x", PRESET, folder, tmp_path)
    text = (tmp_path / "x.md").read_text()
    assert "0.2 is the best for hashed; taken by hashed, frozen." in text and "end of the grid" not in text
    tuning[2]["bpc"]["2"] = 1.5
    (folder / "tune-0.4.json").write_text(json.dumps(tuning[2]))
    write_report("x", PRESET, folder, tmp_path)
    assert (
        "0.4 is the best for hashed; taken by hashed, frozen. It is at the end of the grid"
        in (tmp_path / "x.md").read_text()
    )


def test_the_page_states_the_limits_of_the_preset(tmp_path):
    preset = Preset(PRESET.arms, limits=["The choice of k came from a probe."])
    tuned = study_result("hashed", 0, [(1, 1, 1, 9)], {"2": 3.0}, tries=0.1, split="valid")
    words = "rates were tried with dense, hashed alone"
    for results, told in (([dense(1), hashed(1)], False), ([dense(1), hashed(1), tuned], True)):
        limits = next(s for s in study_page("x", preset, arrange(results)).sections if s.title == "Limits")
        assert "The choice of k came from a probe." in limits.parts
        assert any(words in part for part in limits.parts) == told


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no result file"):
        write_report("x", PRESET, tmp_path / "results", tmp_path / "docs")
    other = hashed(1, format=0)
    write(tmp_path / "results", [other])
    with pytest.raises(UserError, match="format 0"):
        read_results(tmp_path / "results")
