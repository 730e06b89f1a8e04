"""A run in Weights & Biases: the metrics under their names, lists as W&B can draw them. The only file of a run that
imports wandb.

Scalars keep their names. Of a rank's series each rank has one (rank_own_ms/0, ...), or with more than 64 ranks /min,
/median and /max; of a layer's each layer. The rows of a layer's experts are a histogram whose bins are the experts
(expert_rows/0), which W&B draws as a heat map over the steps. W&B's id lives in the run's folder, so a resumed run goes
on in the same W&B run; beside it lies the run's name, for a folder that was copied under another name is another W&B
run.

wandb hands values to a service of its own, a process, and waits for its connection to it. So a thread does that here: a
step never waits, however slow W&B is. When the service is lost a note says so, and the run goes on without it.
"""

import os
import statistics
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb

from foreroute.engine.config import WandbConfig, WandbMode
from foreroute.engine.errors import UserError, require
from foreroute.engine.metrics.names import METRICS, WANDB_ID

MOST_RANKS = 64
"""With more ranks, W&B gets the least, the median and the largest of a rank's series alone."""


def check_key(mode: WandbMode) -> None:
    """Refuse an online run that W&B would refuse; asks nobody.

    Raises:
        UserError: there is no key, or what there is cannot be one.
    """
    if mode is not WandbMode.online:
        return
    try:
        found = wandb.login(prompt=False, verify=False)
    except (wandb.Error, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"wandb.mode=online: {reason}") from error
    require(
        found, "wandb.mode=online: no key; `wandb login` saves one, or WANDB_API_KEY has it, or take wandb.mode=offline"
    )


class WandbRun:
    """The run in W&B, from its start to its end."""

    def __init__(
        self,
        folder: Path,
        config: WandbConfig,
        name: str,
        config_plain: Any,
        resumed: bool,
        note: Callable[[str], None],
    ) -> None:
        """Start or go on; offline runs are written to folder/wandb for a later `wandb sync`.

        Each offline start has a log of its own, which says that it goes on with the run of this id (wandb 0.31 and
        later), so that `wandb sync` appends it to what came before.

        Args:
            note: gets one line when W&B is lost; called in the thread that calls this object.

        Raises:
            UserError: W&B cannot be started.
        """
        if config.mode is WandbMode.offline:  # its service stays off the network
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._note = note
        own_id, copied_from = _identity(folder / WANDB_ID, name, resumed)
        if copied_from is not None:
            note(f"the folder is a copy of the run {copied_from}: it becomes a W&B run of its own")
        try:
            self._run = wandb.init(
                project=config.project,
                group=config.group,
                job_type=config.job_type,
                tags=config.tags or None,  # None: what WANDB_TAGS says
                notes=config.notes,
                name=name,
                id=own_id,
                resume="allow",
                config=config_plain,
                allow_val_change=True,  # a resumed run may log more often, and has started once more
                dir=folder,
                mode=config.mode.value,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise UserError(f"wandb.mode={config.mode.value}: {error}") from error
        for axis in ("tokens", "flops"):
            self._run.define_metric(axis)
        for loss in ("valid_loss", "valid_bpc"):  # of which the table of runs shows the least
            self._run.define_metric(loss, step_metric="tokens", summary="min")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="foreroute-wandb")
        self._given: deque[Future[None]] = deque()
        self._lost = False

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Pass the values of a step to the thread; the caller must not change them afterwards."""
        self._give(lambda: self._log(step, values))

    def summarise(self, values: Mapping[str, float]) -> None:
        """Add numbers to the table of runs."""
        self._give(lambda: self._run.summary.update(dict(values)))

    def close(self, *, failed: bool) -> None:
        """Finish; returns when everything is written, and online sent."""
        self._thread.shutdown()
        self._look()
        try:
            self._run.finish(exit_code=1 if failed else 0)
        except Exception as error:  # of the service, its connection, or the server
            self._lose(error)
        if self._lost:
            with suppress(Exception):  # otherwise it would raise at the interpreter's end
                wandb.teardown()

    def _give(self, act: Callable[[], None]) -> None:
        self._look()
        if not self._lost:
            self._given.append(self._thread.submit(act))

    def _look(self) -> None:
        """Check whether the values that were passed on have arrived."""
        while self._given and self._given[0].done():
            error = self._given.popleft().exception()
            if error is not None:
                self._lose(error)

    def _lose(self, error: BaseException) -> None:
        if not self._lost:
            why = " ".join(str(error).split()) or type(error).__name__
            self._note(f"W&B is lost ({why}): the run goes on without it, metrics.jsonl has all numbers")
        self._lost = True

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if "valid_bpc" in values:  # W&B has one row a step, and the training line's k is already in it
            values = {name: value for name, value in values.items() if name != "k"}
        shown: dict[str, Any] = {}
        for name, value in values.items():
            shown |= _drawn(name, value)
        self._run.log(shown, step=step)


def _identity(file: Path, name: str, resumed: bool) -> tuple[str, str | None]:
    """Return the run's id in W&B, kept in its folder, and the name that the folder was copied from, if it was."""
    copied_from = None
    if resumed and file.exists():
        kept, _, owner = file.read_text(encoding="utf-8").partition("\n")
        if owner.strip() in ("", name):
            return kept.strip(), None
        copied_from = owner.strip()
    fresh = uuid.uuid4().hex[:12]
    file.write_text(f"{fresh}\n{name}\n", encoding="utf-8")
    return fresh, copied_from


def _drawn(name: str, value: Any) -> dict[str, Any]:
    """Turn a metric into what W&B can draw.

    Example: layer_load [1.5, 2.0] gives layer_load/0 and layer_load/1.
    """
    axes = METRICS[name].axes
    if not axes:
        return {name: value}
    if axes == ("rank",) and len(value) > MOST_RANKS:
        return {f"{name}/{of.__name__}": of(value) for of in (min, statistics.median, max)}
    if axes == ("layer", "expert"):
        return {
            f"{name}/{layer}": wandb.Histogram(np_histogram=(rows_E, list(range(len(rows_E) + 1))))
            for layer, rows_E in enumerate(value)
        }
    if axes == ("rank", "peer"):
        links = ((rank, peer) for rank, to in enumerate(value) for peer in range(len(to)))
        return {f"{name}/{rank}/{peer}": value[rank][peer] for rank, peer in links}
    return {f"{name}/{place}": number for place, number in enumerate(value)}
