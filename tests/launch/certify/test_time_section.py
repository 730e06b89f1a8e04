"""The time section of a certificate: what it must not leave unsaid."""

from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.time.cluster import ClusterConfig
from foreroute.engine.certificate.time.forecast import Forecast, LayoutChoice, ScalingPoint, StepsOfK, TimeOfK, TimePart
from foreroute.engine.certificate.time.step_time import StepTime
from foreroute.launch.certify.time_section import layout_verdict, time_section
from foreroute.launch.page.parts import Table

STEP = StepTime(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)


def part(exchange="tokens", scaled=(1, 2), left_out=(), choices=()):
    kinds = [StepsOfK(1, 0, 5, exchange), StepsOfK(2, 5, 5, "gather" if exchange == "tokens" else exchange)]
    scales = [ScalingPoint(ranks, 1, 4, 1.0, 2.0, 1.0) for ranks in scaled]
    forecast = Forecast([TimeOfK(1, 10, exchange, STEP, STEP.total, 9.0)], 210.0, 9.0)
    return TimePart("here", 2, forecast, kinds, kinds[:1], scales, scales, list(choices), list(left_out))


def section(exchange="tokens", scaled=(1, 2), left_out=(), **cluster):
    return time_section(part(exchange, scaled, left_out), ClusterConfig(**cluster), Placement(2, 1, 2)).parts


def test_the_fastest_layout_has_this_runs_tables():
    """21 s a step here; a layout with other tables is another model, however fast."""
    assert layout_verdict(None).good is layout_verdict(part()).good is None
    other, own, this = (
        LayoutChoice(["a=1"], 5.0, False),
        LayoutChoice(["b=2"], 10.5, True),
        LayoutChoice([], 21.0, True),
    )
    found = layout_verdict(part(choices=[other, own, this]))
    assert (found.value, found.note, found.good) == ("another", "50% less time with b=2", False)
    found = layout_verdict(part(choices=[other, this]))
    assert (found.value, found.note, found.good) == ("this one", "of 2 on here", True)


def words(parts):
    return [part for part in parts if isinstance(part, str)]


def tables(parts):
    return [part for part in parts if isinstance(part, Table)]


def test_one_rank_has_no_exchange_to_choose():
    assert any(line.startswith("Exchange: local") for line in words(section("local")))
    (line,) = [line for line in words(section()) if line.startswith("Exchange")]
    assert "as configured: tokens, gather from step 6 (k = 2)" in line
    assert "rates of this cluster: tokens" in line


def test_ranks_that_are_left_out_are_named():
    scaling = tables(section(scaled=(1, 2, 4, 8, 16, 32, 64, 128, 256)))[1]
    assert scaling.notes[-1].startswith("left out: weak on 512, 1,024 ranks; strong on 512, 1,024 ranks")
    whole = tables(section(scaled=[2**i for i in range(11)]))[1]
    assert not any(note.startswith("left out") for note in whole.notes)


def test_what_is_not_modelled_and_figures_without_a_source_are_named():
    assert "Not modelled: train.offload: slow." in words(section(left_out=["train.offload: slow"]))
    assert not any(line.startswith("Not modelled") for line in words(section()))
    rows = {row[0]: row[1:] for row in tables(section(sources={"inside": "measured"}))[-1].rows}
    assert rows["inside.gb_per_s"] == ["1", "measured"]
    assert rows["memory_gb_per_s"] == ["100", "no source given"]
    assert rows["ranks on"] == ["GPUs", ""]
    assert tables(section(host_copies=True))[-1].rows[0][:2] == ["ranks on", "CPUs"]
