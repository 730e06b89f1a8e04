"""The memory section: terms in rows, largest first, and a verdict in words."""

from dataclasses import replace

from foreroute.engine.certificate.memory.peak import Memory, Verdict
from foreroute.engine.certificate.memory.terms import Term
from foreroute.launch.certify.memory_section import memory_section, memory_verdict
from foreroute.launch.page.parts import Verdict as Sentence

TERMS = (
    Term("weights", 4_000_000, "1,000,000 numbers x 4 bytes"),
    Term("attention", 9_000_000, "a + b"),
    Term("Adam moments", 8_000_000, "2 moments x 1,000,000 numbers x 4 bytes", host=True),
)


def memory(verdict=None):
    return Memory(13_000_000, 8_000_000, "optimizer step", 3, 4, True, TERMS, {}, verdict)


def test_rows_are_sorted_split_and_summed_up():
    lead, table, _ = memory_section(memory()).parts
    assert table.header == ["what", "where", "formula", "MB (1e6)"]
    assert table.rows == [
        ["attention", "device", "a", "9.00"],
        ["", "", "+ b", ""],
        ["Adam moments", "host", "2 moments x 1,000,000 numbers x 4 bytes", "8.00"],
        ["weights", "device", "1,000,000 numbers x 4 bytes", "4.00"],
        ["all", "", "", "21.00"],
    ]
    table = memory_section(replace(memory(), terms=TERMS[1:2])).parts[1]  # nothing is on the host
    assert (table.header, table.rows[0]) == (["what", "formula", "MB (1e6)"], ["attention", "a", "9.00"])
    assert "on a GPU" in lead and "optimizer step, k = 3, 4 streams" in lead


def test_the_verdict_in_words():
    assert memory_section(memory()).parts[-1].startswith("0.013 GB at the peak; cluster=NAME or device_memory_gb")
    fits = Verdict(80_000_000, True, 67_000_000, 31)
    assert memory_section(memory(fits)).parts[-1] == Sentence(
        "0.013 GB at the peak: fits into 0.080 GB: 0.067 GB are left; at most 31 streams of a rank in a"
        " micro-batch fit",
        good=True,
    )
    too_small = Verdict(3_000_000, False, -10_000_000, 0)
    assert memory_section(memory(too_small)).parts[-1] == Sentence(
        "0.013 GB at the peak: does not fit into 0.003 GB: 0.010 GB are missing; "
        "not even one stream of a rank in a micro-batch fits",
        good=False,
    )


def test_whether_it_fits_stands_on_top():
    assert memory_verdict(memory()).good is None and "cluster=NAME" in memory_verdict(memory()).note
    fits = memory_verdict(memory(Verdict(80_000_000, True, 67_000_000, 31)))
    assert (fits.value, fits.good) == ("yes", True)
    assert fits.note == "13.0 MB at the peak (optimizer step); 67.0 MB left, by formula"
    small = memory_verdict(memory(Verdict(3_000_000, False, -10_000_000, 0)))
    assert (small.value, small.good) == ("no", False) and "10.0 MB missing" in small.note


def test_k_whose_steps_were_not_counted_are_named():
    assert "Not looked at" not in memory_section(memory()).parts[0]
    some = replace(memory(), uncounted_k=(5, 6))
    assert "Not looked at: steps of k = 5, 6" in memory_section(some).parts[0]
