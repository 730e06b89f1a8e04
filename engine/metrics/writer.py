"""Outputs of a run's numbers: metrics.jsonl and Weights & Biases (engine/metrics/wandb_run.py), named as in METRICS.

One process of a run (rank 0) owns a `Metrics`. metrics.jsonl has one object per call, {"step": 20, "loss": 1.25, ...},
complete after every line; a metric with axes is a list there, or a list of lists, and a number that is not finite is
null. engine/metrics/log_interval.py makes the numbers of training.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from foreroute.engine.config import WandbConfig, WandbMode
from foreroute.engine.errors import RunFailed
from foreroute.engine.metrics.names import JSONL, METRICS
from foreroute.engine.sealed_files import replacing


class Metrics:
    """The open outputs of one run; a context manager that closes them, and marks the run as failed after an error."""

    def __init__(
        self,
        folder: Path,
        wandb_config: WandbConfig,
        *,
        name: str,
        config_plain: Any,
        resume_step: int | None = None,
        note: Callable[[str], None] = print,
    ) -> None:
        """Open the outputs in the run's folder.

        Args:
            folder: The run's folder.
            wandb_config: Section wandb of the configuration.
            name: The run's name in W&B.
            config_plain: The run's configuration, and what else W&B shall show of it, as dicts, lists and numbers.
            resume_step: The run goes on after this step: later lines are dropped. None starts a new run.
            note: Gets a line for the user, such as that W&B is lost.

        Raises:
            RunFailed: metrics.jsonl cannot be written.
            UserError: W&B cannot be started.
        """
        with _writing(folder / JSONL):
            folder.mkdir(parents=True, exist_ok=True)
            if resume_step is not None:
                _drop_lines_after(folder / JSONL, resume_step)
            self._file = (folder / JSONL).open("w" if resume_step is None else "a")
        self._wandb = None
        if wandb_config.mode is not WandbMode.disabled:
            from foreroute.engine.metrics.wandb_run import WandbRun

            resumed = resume_step is not None
            self._wandb = WandbRun(folder, wandb_config, name, config_plain, resumed, note)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None and issubclass(kind, Exception))  # else a signal

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write values under a step's number; METRICS defines which are lists.

        Raises:
            KeyError: a name that METRICS lacks.
            RunFailed: metrics.jsonl cannot be written.
        """
        unknown = sorted(set(values) - set(METRICS))
        if unknown:
            raise KeyError(f"no such metric: {', '.join(unknown)} (engine/metrics/names.py lists them)")
        finite = {name: _finite(value) for name, value in values.items()}
        with _writing(Path(self._file.name)):
            self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
            self._file.flush()
        if self._wandb is not None:
            self._wandb.log(step, values)

    def summarise(self, values: Mapping[str, float]) -> None:
        """Put final numbers beside the run in W&B, such as test_bpc/k4; metrics.jsonl does not have them."""
        if self._wandb is not None:
            self._wandb.summarise(values)

    def close(self, *, failed: bool = False) -> None:
        """Close the file and finish the W&B run; returns when everything is written."""
        with suppress(OSError):  # of a line that could not be written, and log has said so
            self._file.close()
        if self._wandb is not None:
            self._wandb.close(failed=failed)


def _finite(value: Any) -> Any:
    """Replace numbers that JSON lacks by None."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFailed(f"cannot write {file}: {error}") from error


def _drop_lines_after(file: Path, step: int) -> None:
    """Keep the lines up to a step; a last line that a crash cut short goes too."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except ValueError:
            continue
    with replacing(file) as new:
        new.write_text("".join(kept))
