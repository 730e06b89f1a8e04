"""The result of fine-tuning on the console and in its file."""

import time
from pathlib import Path
from typing import Any

from foreroute.engine.finetune.accuracy import Accuracy, Majority
from foreroute.engine.finetune.loop import Point, Selection
from foreroute.launch.runs.folder import write_json
from foreroute.launch.start.console import Console, table


class Progress:
    """Fine-tuning on the console."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.start = console, total, time.perf_counter()
        self.step = console.step

    def point(self, step: int, point: Point) -> None:
        """Show the accuracy on the held-out examples."""
        left = (time.perf_counter() - self.start) / step * (self.total - step)
        text = f"loss {point.training_loss:.3f} held-out {100 * point.held_out.share:.1f} %"
        self.console.say(step, f"lr {point.lr:g} {text}", left)


def write_result(target: Path, result: dict[str, Any]) -> Path:
    """Write the result; return its path, which is another one if the name was taken meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    while target.exists():
        target = target.with_stem(f"{target.stem}-again")
    write_json(target, result)
    return target


def scores_of(scores: dict[str, Accuracy], always: Majority) -> dict[str, Any]:
    """Return the scores for the file."""
    return {
        "dev": {
            name: {
                "accuracy": score.share,
                "interval_95": list(score.interval),
                "correct": score.correct,
                "examples": score.examples,
                "better_than_majority": score.beats(always.share),
            }
            for name, score in scores.items()
        },
        "majority": always._asdict(),
    }


def report(found: Selection, scores: dict[str, Accuracy], always: Majority) -> str:
    """Return the lines that the console shows at the end."""
    chosen = found.chosen
    names = {name: f"k = {name}" if name.isdigit() else name for name in scores}
    rows = [
        [names[name], _percent(score.share), " to ".join(map(_percent, score.interval))]
        for name, score in scores.items()
    ]
    rows.append([f"always {always.label}", _percent(always.share), ""])
    lines = [
        f"selected lr {chosen.lr:g}, step {chosen.step}: held-out {_percent(chosen.held_out.share)} %",
        table(["dev", "accuracy %", "95 % interval"], rows),
    ]
    near = [names[name] for name, score in scores.items() if not score.beats(always.share)]
    if near:
        lines.append(f"not better than always saying {always.label}: {', '.join(near)}")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
