"""The memory section: terms in rows, largest first, and a verdict in words."""

from engine.certificate.memory import Memory, Verdict
from engine.certificate.memory_terms import Term
from launch.memory_page import memory_heading, memory_table, verdict_line

TERMS = (
    Term("weights", 4_000_000, "1,000,000 numbers x 4 bytes"),
    Term("attention", 9_000_000, "a + b"),
    Term("Adam moments", 8_000_000, "2 moments x 1,000,000 numbers x 4 bytes", host=True),
)


def memory(verdict=None):
    return Memory(13_000_000, 8_000_000, "optimizer step", 3, 4, True, TERMS, {}, verdict)


def test_rows_are_sorted_split_and_summed_up():
    header, rows = memory_table(memory())
    assert header == ["what", "MB (1e6)", "where", "formula"]
    assert rows == [
        ["attention", "9.00", "", "a"],
        ["", "", "", "+ b"],
        ["Adam moments", "8.00", "host", "2 moments x 1,000,000 numbers x 4 bytes"],
        ["weights", "4.00", "", "1,000,000 numbers x 4 bytes"],
        ["all", "21.00", "", ""],
    ]
    assert "on a GPU" in memory_heading(memory()) and "optimizer step, k = 3, 4 streams" in memory_heading(memory())  # fmt: skip


def test_the_verdict_in_words():
    assert verdict_line(memory()).startswith("0.013 GB at the peak; with device_memory_gb")
    fits = Verdict(80_000_000, True, 67_000_000, 31)
    assert verdict_line(memory(fits)) == (
        "0.013 GB at the peak: fits into 0.080 GB: 0.067 GB are left; at most 31 streams of a rank in a micro-batch fit"
    )
    too_small = Verdict(3_000_000, False, -10_000_000, 0)
    assert verdict_line(memory(too_small)) == (
        "0.013 GB at the peak: does not fit into 0.003 GB: 0.010 GB are missing; "
        "not even one stream of a rank in a micro-batch fits"
    )
