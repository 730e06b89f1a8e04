"""The second stage: the programs of launch/ on the GPU, beside the same on the CPU.

Each run is a process of its own in a temporary folder. In a dry run "the GPU" is the CPU with the interpreted Triton
kernels, and everything is small.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from benchmarks.gpu_check.setting import Setting, in_processes
from benchmarks.gpu_check.stage_1 import CLOSE

ROOT = Path(__file__).resolve().parents[2]
MODULES = {"deepspeed": "deepspeed", "hydra-core": "hydra", "safetensors": "safetensors", "matplotlib": "matplotlib"}
TEXT_BYTES = 1_500_000
MEMORY_SLACK = 64 << 20  # bytes of workspaces of the libraries, which the certificate does not count
MEMORY_ERROR = 0.1  # of the certificate
_SMALL = (
    "data.streams=2",
    "data.segment=16",
    "model.layers=1",
    "model.width=16",
    "model.heads=2",
    "model.head_width=8",
    "model.memory=16",
    "moe.experts=4",
    "moe.expert_width=16",
    "moe.rows=512",
    "schedule.k_min=2",
    "schedule.k_max=2",
    "eval.k=[2]",
    "eval.streams=2",
    "eval.segment=16",
    "eval.memory=16",
    "eval.max_symbols=64",
)


class Wrong(RuntimeError):
    """A fault of a program; the text is one line about it."""


@dataclass(slots=True)
class Program:
    """A program of launch/ that runs."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    until: float

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            Wrong: it failed, or took too long.
        """
        try:
            code = self.process.wait(max(0.0, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Wrong(f"{self.name}: has no result in its time; {self._last()}") from None
        if code:
            raise Wrong(f"{self.name}: exit code {code}: {self._last()}")

    def close(self) -> None:
        """End it, with what it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _last(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        told = [line for line in lines if line.startswith("foreroute: ")]
        return (told or lines or [""])[-1]


@dataclass(slots=True)
class Programs:
    """Starts programs; programs that are still running at the end of the block are ended."""

    setting: Setting
    stack: ExitStack
    until: float = field(init=False)

    def __post_init__(self) -> None:
        self.until = time.monotonic() + self.setting.seconds

    def start(self, name: str, program: str, options: Sequence[str], **environ: str) -> Program:
        """Start `python -m foreroute.launch.PROGRAM OPTIONS` with more variables."""
        log = self.setting.work / f"{name}.{len(list(self.setting.work.glob('*.log')))}.log"
        own = {
            "PYTHONPATH": f"{ROOT}:{self.setting.work / 'packages'}",
            "DS_ACCELERATOR": "cpu" if self.setting.dry_run else "cuda",
        }
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", f"foreroute.launch.{program}", *options],
                cwd=self.setting.work,
                env=os.environ | own | environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.stack.enter_context(closing(Program(name, process, log, self.until)))

    def train(self, name: str, options: Sequence[str], **environ: str) -> Program:
        """Start a training whose folder has this name."""
        return self.start(name, "train", [*options, f"train.name={name}", "train.log_every=1"], **environ)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Return the numbers that a training has logged."""
        path = self.setting.work / "runs" / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def losses(self, name: str) -> list[float]:
        """Return the losses of a training, step by step."""
        return [line["loss"] for line in self.lines(name)]


def packages(setting: Setting) -> dict[str, Any]:
    """Install what this Python lacks from the folder of wheels, into the temporary folder."""
    missing = _missing()
    if not missing:
        return {"installed": "here already"}
    wheels = sorted(setting.wheels.glob("*.whl"))
    if not wheels:
        raise Wrong(f"{', '.join(missing)} missing, and no wheels in {setting.wheels}: make gpu-wheels fills it")
    target = setting.work / "packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--target", target, *wheels],
        capture_output=True,
        text=True,
        check=False,
        timeout=setting.seconds,
    )
    if done.returncode:
        raise Wrong(f"pip: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return {"wheels": len(wheels), "wheels_mb": sum(wheel.stat().st_size for wheel in wheels) / 1e6}


def quickstart(setting: Setting) -> dict[str, Any]:
    """Train the quickstart on the GPU and on the CPU at once."""
    with ExitStack() as stack:
        programs = Programs(setting, stack)
        options = _quickstart(setting)
        on_cpu = [o for o in options if not o.startswith("kernels.backend=")]
        both = programs.train("gpu", options), programs.train("cpu", on_cpu, DS_ACCELERATOR="cpu")
        for program in both:
            program.wait()
        got, want = programs.losses("gpu"), programs.losses("cpu")
        last = programs.lines("gpu")[-1]
    early = _apart(got[:10], want[:10])
    failed = _too_far(setting, got, want, "the CPU's")
    if early > CLOSE / 20:
        failed.append(f"the first ten losses are up to {early:.1e} from the CPU's")
    if not setting.dry_run and got[-1] > 0.9 * got[0]:
        failed.append(f"the loss goes from {got[0]:.3f} to {got[-1]:.3f}")
    return {
        "failed": failed,
        "apart": _apart(got, want),
        "apart_early": early,
        "last_loss": got[-1],
        "tokens_per_second": last["tokens_per_second"],
        "losses": got,
    }


def resume(setting: Setting) -> dict[str, Any]:
    """Train half of the steps, resume, and compare with the run that was never stopped."""
    with ExitStack() as stack:
        programs = Programs(setting, stack)
        want = _alone(programs)
        programs.train("halves", [*_quickstart(setting), f"train.steps={len(want) // 2}"]).wait()
        programs.train("halves", [*_quickstart(setting), "train.resume=true"]).wait()
        got = programs.losses("halves")
    return {"failed": _too_far(setting, got, want, "those of a run never stopped"), "apart": _apart(got, want)}


def ranks(setting: Setting) -> dict[str, Any]:
    """Train as two ranks that share the GPU, each with half of the experts. NCCL refuses that, so gloo is used."""
    refused = _refused_by_gloo(setting)
    if refused:
        return {"not_possible": f"two ranks on one GPU: gloo refuses {'; '.join(refused)}"}
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    options = [*_quickstart(setting), "parallel.expert_ranks=2", "parallel.collectives=gloo"]
    with ExitStack() as stack:
        programs = Programs(setting, stack)
        want = _alone(programs)
        both = [programs.train("ranks", options, **shared, RANK=str(rank)) for rank in range(2)]
        for program in both:
            program.wait()
        got = programs.losses("ranks")
    return {"failed": _too_far(setting, got, want, "those of one rank"), "apart": _apart(got, want)}


def memory(setting: Setting) -> dict[str, Any]:
    """Certify a model, hold its run to the certificate, and compare the peak of the device's memory."""
    options = [o for o in _text_options(setting) if not o.startswith("corpus=")]
    options += ["experiment=enwik8_hashed", "train.steps=20", "eval.k=[4]", "eval.max_symbols=1000"]
    if setting.dry_run:
        options = [*_quickstart(setting)]
    with ExitStack() as stack:
        programs = Programs(setting, stack)
        programs.start("certify", "certify", [*options, "train.name=held", "out=certificate"]).wait()
        programs.train("held", [*options, "certificate=certificate"]).wait()
        last = programs.lines("held")[-1]
    told = json.loads((setting.work / "certificate" / "certificate.json").read_text())["memory"]["peak_bytes"]
    peak = last["peak_device_memory_bytes"]
    fine = setting.dry_run or abs(peak - told) <= MEMORY_ERROR * told + MEMORY_SLACK
    return {
        "failed": [] if fine else [f"the peak was {peak / 1e6:,.1f} MB, the certificate says {told / 1e6:,.1f}"],
        "peak_mb": peak / 1e6,
        "certified_mb": told / 1e6,
        "tokens_per_second": last["tokens_per_second"],
        "mfu": last["mfu"],
    }


def _missing() -> list[str]:
    return [name for name, module in MODULES.items() if importlib.util.find_spec(module) is None]


def _text_options(setting: Setting) -> list[str]:
    """Choose a text that every Python has: sources of its library."""
    text = setting.work / "text.py"
    if not text.exists():
        sources = sorted(Path(os.__file__).parent.glob("*.py"))
        size = TEXT_BYTES // 30 if setting.dry_run else TEXT_BYTES
        text.write_bytes(b"".join(source.read_bytes() for source in sources)[:size])
    return ["corpus=file", f"corpus.path={text}", "corpus.cache_dir=cache"]


def _quickstart(setting: Setting) -> list[str]:
    """Return the options of the run that several parts repeat: its learning rate does not depend on the number of
    steps."""
    options = ["experiment=quickstart", *_text_options(setting), "optim.decay=constant", "optim.warmup_steps=2"]
    if setting.dry_run:
        return [*options, *_SMALL, "train.steps=4", "train.threads=1", "kernels.backend=triton"]
    return [*options, "train.steps=200", "eval.k=[4]", "eval.max_symbols=4000"]


def _alone(programs: Programs) -> list[float]:
    """Return the losses of the quickstart on the GPU, of the part before or of a run for this one."""
    found: list[float] | None = programs.setting.found.get("quickstart", {}).get("losses")
    if found is None:
        programs.train("alone", _quickstart(programs.setting)).wait()
        found = programs.losses("alone")
    return found


def _apart(got: Sequence[float], want: Sequence[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(got, want, strict=True))


def _too_far(setting: Setting, got: Sequence[float], want: Sequence[float], whose: str) -> list[str]:
    allowed = 1e-4 if setting.dry_run else CLOSE
    if len(got) != len(want):
        return [f"{len(got)} losses, {len(want)} are {whose}"]
    apart = _apart(got, want)
    return [] if apart <= allowed else [f"losses are up to {apart:.1e} from {whose}"]


def _refused_by_gloo(setting: Setting) -> list[str]:
    """Try each collective of a run on the device's tensors."""
    meeting = setting.work / "gloo"
    found = in_processes(partial(_try_gloo, file=str(meeting), device=setting.device), (0, 1), 40, least=2)
    meeting.unlink(missing_ok=True)
    if len(found) < 2:
        return ["to begin in 40 s"]
    both = [[str(one)] if isinstance(one, Exception) else one for one in found.values()]
    return list(dict.fromkeys(line for one in both for line in one))


def _try_gloo(rank: int, *, file: str, device: str) -> list[str]:
    """Call the collectives of DeepSpeed and the exchange; return those that gloo refuses, with the reason."""
    warnings.simplefilter("ignore", FutureWarning)  # names that newer PyTorch has others for
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    two, four = torch.ones(2, device=device), torch.ones(4, device=device)
    uneven = ([1, 3], [1, 1]) if rank == 0 else ([1, 1], [3, 1])
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(two.clone()),
        "broadcast": lambda: dist.broadcast(two.clone(), 0),
        "reduce": lambda: dist.reduce(two.clone(), 0),
        "all_gather": lambda: dist.all_gather_into_tensor(four.clone(), two),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(two.clone(), four),
        "all_to_all": lambda: dist.all_to_all_single(
            torch.empty(sum(uneven[1]), device=device), torch.ones(sum(uneven[0]), device=device), *uneven[::-1]
        ),
    }
    refused = []
    for name, call in calls.items():
        try:
            call()
        except RuntimeError as error:
            refused.append(f"{name}: {str(error).splitlines()[0]}")
    dist.destroy_process_group()
    return refused


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
