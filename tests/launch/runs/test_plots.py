"""The two plots of a run, drawn as SVG to be read."""

import json
import re

from foreroute.launch.runs.plots import plot_loss, plot_slimming


def words(file):
    return set(re.findall(r"<text[^>]*>([^<]*)</text>", file.read_text()))


def test_the_loss_has_validations_where_there_are_any(tmp_path):
    rows = [{"step": i, "tokens": 100 * i, "bpc": 8 - i} for i in (1, 2, 3)]
    metrics, target = tmp_path / "metrics.jsonl", tmp_path / "loss.svg"
    for last, shown in (({}, False), ({"step": 3, "tokens": 300, "valid_bpc": 5.5}, True)):
        metrics.write_text("".join(json.dumps(row) + "\n" for row in [*rows, last] if row))
        plot_loss(metrics, target)
        assert ({"training", "validation"} <= words(target)) == shown and {"Loss", "symbols"} <= words(target)
    metrics.write_text("")
    plot_loss(metrics, target)  # nothing was logged yet
    assert "validation" not in words(target)


def test_slimming_has_the_model_and_the_levels(tmp_path):
    target = tmp_path / "slimming.svg"
    plot_slimming({"1": 3.7, "4": 3.4, "16": 3.5}, {"order 2": 2.9}, target)
    assert {"model", "order 2", "1", "4", "16"} <= words(target)
    plot_slimming({"dense": 3.7}, {"order 2": 2.9}, target)
    assert {"dense", "order 2"} <= words(target) and "model" not in words(target)
