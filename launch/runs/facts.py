"""facts.json in a run's folder: facts that do not change while it trains, for readers of its metrics, such as a report.

Rank 0 writes it at each start of training; "started" keeps the times of all starts. Its contents, all of this start:

    parameters, active_parameters {k: number}, flops_per_symbol {k: of a forward pass}, symbols_per_step, steps, router
    ranks, expert_ranks, nodes, device, peak_flops (of one device, FLOP/s; 0: unknown), peak_source
    corpus {name, symbols, sha256, tokens}, code {version, commit, changed}, versions {python, torch, triton, deepspeed}
    certificate {path, from_step: steps that were done before this start, wire_bytes_by_k {k: mean bytes that all ranks
    send in
        a step}}, or null: held to none
    started [ISO time of each start]
    lengths [[step, train.steps from this step on], ...]: more than one where a run was made longer or shorter

Instead of a k stands "dense" where there are no experts. A commit is null outside a git checkout.
"""

import json
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import foreroute
from foreroute.engine.certificate.counts.exact import counted_kind
from foreroute.engine.certificate.record import Written
from foreroute.engine.errors import RunFailed
from foreroute.engine.train.trainer import Trainer
from foreroute.launch.runs.folder import FACTS, write_json

ROOT = Path(__file__).resolve().parents[2]


def write_facts(trainer: Trainer, written: Written | None, *, resuming: bool = False) -> dict[str, Any]:
    """Write facts.json for a start of training; returns its content.

    Args:
        written: the certificate that the run is held to.
        resuming: the folder held this run before.

    Raises:
        RunFailed: it cannot be written.
    """
    file = trainer.folder / FACTS
    before: dict[str, Any] = {}
    if resuming:
        with suppress(OSError, ValueError):
            before = json.loads(file.read_text())
    steps = trainer.config.train.steps
    lengths = before.get("lengths", [[0, before.get("steps", steps)]])
    if lengths[-1][1] != steps:
        lengths = [*lengths, [trainer.step, steps]]
    found = {
        **_of_run(trainer),
        "device": _device_name(trainer.world.device),
        "peak_flops": trainer.peak.flops,
        "peak_source": trainer.peak.source,
        "code": code(),
        "versions": _versions(),
        "certificate": None if written is None else {**_of_certificate(written), "from_step": trainer.step},
        "lengths": lengths,
        "started": [*before.get("started", []), datetime.now(UTC).isoformat(timespec="seconds")],
    }
    try:
        write_json(file, found)
    except OSError as error:
        raise RunFailed(f"cannot write {file}: {error}") from error
    return found


def _of_run(trainer: Trainer) -> dict[str, Any]:
    config, corpus, arithmetic = trainer.config, trainer.corpus, trainer.arithmetic
    ks = arithmetic.by_k()
    return {
        "parameters": trainer.parameters,
        "active_parameters": {name: arithmetic.active_parameters(k) for name, k in ks.items()},
        "flops_per_symbol": {name: round(arithmetic.flops_per_symbol(k)) for name, k in ks.items()},
        "symbols_per_step": config.symbols_per_step,
        "steps": config.train.steps,
        "ranks": trainer.world.mesh.world,
        "expert_ranks": trainer.world.mesh.ep_size,
        "nodes": trainer.world.nodes,
        "router": config.moe.router,
        "corpus": {
            "name": config.corpus.name.name,
            "symbols": len(corpus.ids),
            "sha256": corpus.sha256,
            "tokens": config.corpus.tokens.name,
        },
    }


def _of_certificate(written: Written) -> dict[str, Any]:
    mean_bytes = {
        str(part["k"]): part["bytes"][counted_kind(part["exchange"])]["total"] / part["steps"]
        for part in written.facts["by_k"]
    }
    return {"path": str(written.path), "wire_bytes_by_k": mean_bytes}


def code() -> dict[str, Any]:
    """Return the version of the code, the commit of its checkout, and whether files were changed since."""
    commit, changes = (_git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no"))
    return {
        "version": foreroute.__version__,
        "commit": commit,
        "changed": None if commit is None or changes is None else changes != "",
    }


def _git(*arguments: str) -> str | None:
    """Return git's answer about the checkout; None if it is none, or there is no git."""
    if not (ROOT / ".git").exists():  # the folder may lie in a checkout of something else
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}  # with its build
    for package in ("triton", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
