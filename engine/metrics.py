"""Where a run's numbers go: metrics.jsonl and Weights & Biases, all under the names of METRICS.

The only file that imports wandb, and only when its mode is not disabled. One process of a run (rank 0) owns a `Metrics`.
metrics.jsonl has one object per call, {"step": 20, "loss": 1.25, ...}, complete after every line; a value that is not
finite is null there. The W&B id lives in the run's folder, so a resumed run goes on in the same W&B run.
"""

import json
import math
import os
import resource
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from engine.config import WandbConfig, WandbMode
from engine.errors import RunFailed, UserError

JSONL = "metrics.jsonl"
WANDB_ID = "wandb_id.txt"


class Metric(NamedTuple):
    """What a metric's numbers are."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "loss": Metric(
        "nats/symbol", "training loss without auxiliary losses, mean since the last line"
    ),
    "auxiliary_loss": Metric(
        "nats/symbol", "balance, z- or consistency loss, weighted; 0 for fixed routers"
    ),
    "bpc": Metric("bits/symbol", "loss in bits"),
    "valid_loss": Metric("nats/symbol", "loss on the validation split at k_max"),
    "valid_bpc": Metric("bits/symbol", "valid_loss in bits"),
    "k": Metric("experts", "active experts per token"),
    "learning_rate": Metric("1", "learning rate of this step"),
    "grad_norm": Metric("1", "global gradient norm before clipping"),
    "tokens": Metric("symbols", "trained on since the start of the run, over all ranks"),
    "tokens_per_second": Metric(
        "symbols/s", "trained on per second since the last line, over all ranks"
    ),
    "step_ms": Metric("ms", "one optimizer step, mean since the last line; the parts below too"),
    "plan_wait_ms": Metric("ms", "waiting for a batch and its plans"),
    "forward_ms": Metric("ms", "forward passes"),
    "backward_ms": Metric("ms", "backward passes"),
    "optimizer_ms": Metric("ms", "gradient clipping and update"),
    "outside_ms": Metric("ms", "step time outside forward, backward and optimizer"),
    "attention_ms": Metric("ms", "attention, part of forward_ms"),
    "experts_ms": Metric("ms", "expert layers, part of forward_ms"),
    "exchange_exposed_ms": Metric("ms", "exchanging rows while nothing is computed; 0 on one rank"),
    "exchange_hidden_ms": Metric("ms", "exchanging rows behind computation; 0 on one rank"),
    "own_ms": Metric(
        "ms", "forward passes without waiting for other ranks, part of forward_ms; of rank 0"
    ),
    "slowest_rank": Metric("rank", "the rank with the most own_ms since the last line"),
    "rank_skew": Metric("1", "its own_ms over the median rank's; 1 on one rank"),
    "wire_bytes": Metric(
        "bytes", "rows sent to other ranks in one step, over all ranks and layers"
    ),
    "load_max_over_mean": Metric("1", "rows of the busiest expert over the mean, worst layer"),
    "memory_bytes": Metric("bytes", "resident memory of this process now"),
    "peak_memory_bytes": Metric("bytes", "largest resident memory of this process so far"),
    "mfu": Metric("1", "useful arithmetic over the machine's peak; 0 when the peak is unknown"),
}


class Metrics:
    """The open outputs of one run."""

    def __init__(
        self,
        folder: Path,
        wandb_config: WandbConfig,
        *,
        name: str,
        config_plain: Any,
        resume_step: int | None = None,
    ) -> None:
        """Open the outputs in the run's folder.

        Args:
            folder: The run's folder.
            wandb_config: Mode, project and group.
            name: The run's name in W&B.
            config_plain: The run's configuration as dicts, lists and numbers.
            resume_step: The run goes on after this step: later lines are dropped. None starts a new run.

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
            resumed = resume_step is not None
            self._wandb = _start_wandb(folder, wandb_config, name, config_plain, resumed)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write values under a step's number.

        Raises:
            KeyError: a name that METRICS lacks.
            RunFailed: metrics.jsonl cannot be written.
        """
        unknown = sorted(set(values) - set(METRICS))
        if unknown:
            raise KeyError(f"no such metric: {', '.join(unknown)} (engine/metrics.py lists them)")
        finite = {name: v if math.isfinite(v) else None for name, v in values.items()}
        with _writing(Path(self._file.name)):
            self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
            self._file.flush()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Close the file and finish the W&B run; returns when everything is written."""
        with suppress(OSError):  # of a line that could not be written, and log has said so
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFailed(f"cannot write {file}: {error}") from error


def memory_bytes() -> int:
    """Give the resident memory of this process."""
    return psutil.Process().memory_info().rss


def peak_memory_bytes() -> int:
    """Give the largest resident memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB except on macOS


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
    new = file.with_name(file.name + ".new")
    new.write_text("".join(kept))
    new.replace(file)


def _start_wandb(
    folder: Path, config: WandbConfig, name: str, config_plain: Any, resumed: bool
) -> Any:
    """Start the W&B run; offline runs are written to folder/wandb for a later `wandb sync`."""
    if config.mode is WandbMode.offline:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its service stays off the network
    import wandb

    id_file = folder / WANDB_ID
    if not (resumed and id_file.exists()):
        id_file.write_text(uuid.uuid4().hex[:12])
    try:
        return wandb.init(
            project=config.project,
            group=config.group,
            name=name,
            id=id_file.read_text().strip(),
            # an offline log has no past
            resume="allow" if config.mode is WandbMode.online else None,
            config=config_plain,
            dir=folder,
            mode=config.mode.value,
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise UserError(f"wandb.mode={config.mode.value}: {error}") from error
