"""The Weights & Biases dashboard of a project, as code: `python -m launch.dashboard project=NAME out=FILE`.

SECTIONS says which metrics of engine/metrics/names.py each panel shows; titles get their units from there. The
specification is the same in every call, down to its ids, so it can be kept in version control and compared. It is
printed or written; only apply=true sends it, and a second time changes the dashboard of the first. The only file that
knows wandb_workspaces.
"""

import hashlib
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foreroute.engine.config import WandbConfig, check_project
from foreroute.engine.config.option import check, option
from foreroute.engine.errors import RunFailed, UserError, require
from foreroute.engine.metrics.names import METRICS
from foreroute.launch.start.cli import run_program

XAxis = Literal["Step", "tokens", "flops"]


@dataclass
class DashboardArgs:
    """Options: the project, and what to do with its dashboard."""

    project: str = option(WandbConfig.project, "Project at W&B, as wandb.project of its runs.")
    entity: str | None = option(None, "Team or user that the project belongs to; needed with apply=true.")
    name: str = option(
        "foreroute", "Title of the dashboard. apply=true changes the one of this title that it made before."
    )
    layers: int = option(4, "First layers whose experts get a heat map each.", at_least=0)
    out: str | None = option(None, "File of the specification as JSON; null prints it, unless it is sent.")
    apply: bool = option(
        False, "Send the dashboard to the project, with the key that `wandb login` saved or WANDB_API_KEY has."
    )

    def __post_init__(self) -> None:
        check("", self)
        check_project("project", self.project.strip())
        require(bool(self.name.strip()), f"name={self.name!r}: must not be empty")
        odd = "".join(c for c in self.name if unicodedata.category(c).startswith("S"))
        require(not odd, f"name={self.name!r}: must have no symbols such as {odd!r}")
        require(
            self.entity is not None or not self.apply,
            "entity is missing: apply=true needs entity=TEAM (or your user name)",
        )


@dataclass(frozen=True, slots=True)
class Panel:
    """One line chart: a line for each metric, or for each rank or layer of one that has them."""

    title: str
    # Of METRICS, all in the same unit; a metric with a rank or layer axis has a panel alone.
    names: tuple[str, ...]
    x: XAxis = "Step"
    log_x: bool = False


def _panel(title: str, *names: str, x: XAxis = "Step", log_x: bool = False) -> Panel:
    return Panel(title, names, x, log_x)


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Throughput": (
        _panel("Speed, all ranks", "tokens_per_second"),
        _panel("Speed of a rank", "tokens_per_second_per_rank"),
        _panel("Use of the peak (MFU)", "mfu"),
        _panel("Step and its parts", "step_ms", "forward_ms", "backward_ms", "optimizer_ms", "outside_ms"),
        _panel("Inside the forward pass", "forward_ms", "attention_ms", "experts_ms"),
        _panel("Outside the model", "outside_ms", "plan_wait_ms", "metric_ms", "data_ms"),
        _panel("Step and its processor time", "step_ms", "processor_ms"),
    ),
    "Exchange": (
        _panel("Time of the exchange", "exchange_exposed_ms", "exchange_hidden_ms"),
        _panel("Sent in a step, all ranks", "wire_bytes", "wire_bytes_inside", "wire_bytes_between"),
        _panel("Sent in a step, by rank", "rank_wire_bytes"),
        _panel("Sent in a step for n-gram tables", "table_bytes"),
        _panel("Sent in a step, by link", "link_bytes"),
        _panel("Exposed exchange, by rank", "rank_exchange_exposed_ms"),
    ),
    "Experts": (
        _panel("Active experts", "k"),
        _panel("Active parameters", "active_parameters"),
        _panel("Busiest expert over the mean", "load_max_over_mean"),
        _panel("Busiest expert over the mean, by layer", "layer_load"),
        _panel("Busiest rank over the mean", "rank_load_max_over_mean"),
        _panel("Rows computed in a step, by rank", "rank_rows"),
    ),
    "Quality against compute": (
        _panel("Bits per symbol against text", "bpc", "valid_bpc", x="tokens"),
        _panel("Bits per symbol against compute", "bpc", "valid_bpc", x="flops", log_x=True),
        _panel("Held-out bits per symbol against compute", "valid_bpc", x="flops", log_x=True),
        _panel("Loss against text", "loss", "valid_loss", x="tokens"),
        _panel("Loss against compute", "loss", "valid_loss", x="flops", log_x=True),
        _panel("Auxiliary loss against text", "auxiliary_loss", x="tokens"),
    ),
    "Health": (
        _panel("Gradient norm", "grad_norm"),
        _panel("Learning rate", "learning_rate"),
        _panel("Slowest rank over the median", "rank_skew"),
        _panel("Which rank is slowest", "slowest_rank"),
        _panel("Own time of the forward pass, by rank", "rank_own_ms"),
        _panel("Waiting for plans, by rank", "rank_plan_wait_ms"),
        _panel("Memory of rank 0", "memory_bytes", "peak_memory_bytes"),
        _panel("Device memory of rank 0", "device_memory_bytes", "peak_device_memory_bytes"),
        _panel("Memory, by rank", "rank_memory_bytes"),
    ),
}
HEAT_MAPS = "expert_rows"
"""The metric with a heat map for each layer, in the section Experts: W&B draws histograms over steps so."""
LEFT_OUT = {"own_ms": "rank_own_ms has it for every rank"}
"""Metrics without a panel, and why."""


def dashboard(args: DashboardArgs) -> int:
    """Print, write or send the dashboard; returns the exit code."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its service stays off the network
    os.environ.setdefault("WANDB_SILENT", "true")  # no questions at the terminal
    with _wandb_errors():
        workspace = build(args)
        text = specification(workspace)
        if args.out is not None:
            Path(args.out).write_text(text, encoding="utf-8")
            print(f"written: {args.out}")
        elif not args.apply:
            sys.stdout.write(text)
        if args.apply:
            _find(workspace)
            print(f"sent: {workspace.save().url}")
    return 0


def build(args: DashboardArgs) -> Any:
    """Make the dashboard as a wandb_workspaces.workspaces.Workspace whose ids depend on its titles alone."""
    import wandb_workspaces.workspaces as ws

    sections = []
    for title, panels in SECTIONS.items():
        plots = [_plot(title, panel) for panel in panels]
        if title == "Experts":
            plots += [_heat_map(title, layer) for layer in range(args.layers)]
        layout = ws.SectionLayoutSettings(columns=3, rows=-(-len(plots) // 3))
        sections.append(ws.Section(name=title, panels=plots, is_open=True, layout_settings=layout))
    workspace = ws.Workspace(entity=args.entity or "", project=args.project, name=args.name, sections=sections)
    workspace._internal_name = f"nw-{_id(args.name)}-v"
    workspace._internal_runset_id = _id("runs")
    return workspace


def specification(workspace: Any) -> str:
    """Write a dashboard as the JSON that is kept at W&B: entity, project, displayName, name, id and spec."""
    return str(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2)) + "\n"


def titled(panel: Panel) -> str:
    """Return the panel's title with the unit of its metrics; no unit for plain numbers."""
    unit = METRICS[panel.names[0]].unit
    return panel.title if unit == "1" else f"{panel.title} [{unit}]"


def _plot(section: str, panel: Panel) -> Any:
    from wandb_workspaces.reports.v2 import LinePlot

    by_axis = bool(METRICS[panel.names[0]].axes)
    unit = METRICS[panel.names[0]].unit
    plot = LinePlot(
        title=titled(panel),
        x=panel.x,
        y=[] if by_axis else list(panel.names),
        metric_regex=f"^{panel.names[0]}/" if by_axis else None,
        log_x=panel.log_x or None,
        title_x=None if panel.x == "Step" else f"{panel.x} [{METRICS[panel.x].unit}]",
        title_y=None if unit == "1" else unit,
    )
    plot._id = _id(section, panel.title)
    return plot


def _heat_map(section: str, layer: int) -> Any:
    from wandb_workspaces.reports.v2 import LinePlot

    title = f"Rows of each expert in a step, layer {layer}"
    plot = LinePlot(title=f"{title} [{METRICS[HEAT_MAPS].unit}]", y=[f"{HEAT_MAPS}/{layer}"], title_y="expert")
    plot._id = _id(section, title)
    return plot


def _id(*words: str) -> str:
    """Return an id of 11 letters and digits, as W&B's own are, that is the same in every call."""
    return hashlib.sha256("/".join(words).encode()).hexdigest()[:11]


def _find(workspace: Any) -> None:
    """Set the dashboard's id to that of an earlier call's dashboard in the project, if there is one."""
    from wandb_workspaces.workspaces.internal import get_view_dict

    name = workspace._internal_name.removeprefix("nw-").removesuffix("-v")
    try:
        found = get_view_dict(workspace.entity, workspace.project, name)
    except ValueError as error:
        if f"Workspace `{name}` not found" in str(error):
            return  # not made yet
        raise UserError(f"project={workspace.project}: {error}") from error
    workspace._internal_id = found["id"]


@contextmanager
def _wandb_errors() -> Iterator[None]:
    """Turn errors of wandb into one line. They share no class that is available without importing wandb."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("wandb"):
            raise
        if type(error).__name__ == "UsageError":
            raise UserError(f"apply=true: {error}") from error
        raise RunFailed(f"W&B: {error}") from error


def main() -> None:
    """Entry point."""
    run_program("dashboard", DashboardArgs, dashboard)


if __name__ == "__main__":
    main()
