"""The check for GPUs, dry: on the CPU with interpreted kernels."""

import json
import math
import os
import subprocess
import sys
import sysconfig
import time
import venv
from dataclasses import astuple, replace
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks.gpu_check.programs import Wrong, packages
from benchmarks.gpu_check.setting import Setting, in_processes
from benchmarks.gpu_check.speed import Peaks, bound_ms
from benchmarks.gpu_check.tile_sweep import Aim, climb, neighbours, text
from benchmarks.systems.peers import Shape
from foreroute.kernels import tiles
from foreroute.kernels.tiles import Entry, Tile

ROOT = Path(__file__).resolve().parents[2]
STAGES = {
    "1": {"kernels", "reads", "graph", "training", "speed", "tile_sweep"},
    "2": {"packages", "quickstart", "resume", "ranks", "memory"},
}
WHEELS = ROOT / ".cache/gpu-wheels"
NEEDLESS = (
    "deepspeed",
    "hydra",
    "omegaconf",
    "wandb",
    "safetensors",
    "mpi4py",
    "matplotlib",
    "plotly",
    "psutil",
    "rich",
    "tqdm",
)
BLOCKED = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NEEDLESS}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from benchmarks.gpu_check.program import _parts
import benchmarks.bench_kernels
_parts()
"""


def start(*arguments, python=sys.executable, **more):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run([python, *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_a_dry_run_is_fine_and_goes_on_where_it_was(tmp_path):
    command = ["-m", "benchmarks.gpu_check", "--dry-run", "--out", str(tmp_path)]
    done = start(*command)
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and found["failures"] == [], done.stdout + done.stderr
    assert {stage: {*parts} for stage, parts in found["stages"].items()} == STAGES
    first, second = found["stages"].values()
    assert first["kernels"]["left_out"] == 0 and first["speed"]["refused"] == [] and first["tile_sweep"]["tried"] == 2
    assert second["resume"]["apart"] == 0.0  # bit for bit
    assert second["ranks"]["apart"] < 1e-5 and "not_possible" not in second["ranks"]
    assert second["memory"]["certified_mb"] > 0
    (kept,) = tmp_path.iterdir()
    told = json.loads(kept.read_text())
    told["training"]["first_loss"] = 123  # is not measured again
    told["reads"]["failed"] = ["broken"]  # is
    kept.write_text(json.dumps(told))
    again = json.loads(start(*command, "--only", "training", "reads").stdout.splitlines()[-1])
    assert again["failures"] == [] and again["stages"]["1"]["training"]["first_loss"] == 123


@pytest.mark.slow
def test_the_first_stage_needs_torch_triton_and_numpy_alone():
    done = start("-c", BLOCKED)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def bare_python(tmp_path):
    """A Python that has torch, triton, numpy, and what these require, beside pip."""
    venv.create(tmp_path / "bare")
    (site,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    here, left, seen = Path(sysconfig.get_path("purelib")), ["torch", "triton", "numpy", "pip"], set()
    while left:
        name = left.pop().lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another system
        left += [line.split(";")[0].split("[")[0].strip(" <>=!~.,0123456789") for line in found.requires or []]
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(here / top)
    return tmp_path / "bare/bin/python"


@pytest.mark.slow
@pytest.mark.skipif(
    not [*WHEELS.glob(f"pydantic_core-*-cp{sys.version_info[0]}{sys.version_info[1]}-*")],
    reason="no wheels for this Python: make gpu-wheels",
)
def test_the_second_stage_needs_these_and_the_wheels(tmp_path, bare_python):
    assert start("-c", "import deepspeed", python=bare_python).returncode == 1
    command = ["-m", "benchmarks.gpu_check", "--dry-run", "--out", str(tmp_path / "out"), "--only", "memory"]
    done = start(*command, python=bare_python)
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and found["failures"] == [], done.stdout + done.stderr
    assert found["stages"]["2"]["packages"]["wheels"] > 20


def test_packages_without_wheels_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_check.programs.MODULES", {"one": "no_such_module", "two": "torch"})
    with pytest.raises(Wrong, match=r"^one missing, and no wheels in .*: make gpu-wheels"):
        packages(Setting(True, 1.0, wheels=tmp_path))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "no GPU here; --dry-run"),
        (("--dry-run", "--only", "reads", "tea"), "--only tea: must be of kernels, reads"),
    ],
)
def test_what_cannot_be_asked_is_one_line(tmp_path, arguments, line):
    done = start("-m", "benchmarks.gpu_check", "--out", str(tmp_path), *arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and line in done.stderr.splitlines()[-1]


def test_the_bound_is_the_longer_of_arithmetic_and_memory():
    """100 rows, widths 10 and 20, 2 experts: 240,000 FLOP and 4 (2,400 + 3,000 + 14,000 + 4,000) = 93,600 bytes."""
    shape = Shape(50, 10, 20, 2, 2)
    assert bound_ms(shape, "fp32", Peaks(1e-6, 1.0, "")) == (pytest.approx(240.0), "arithmetic")
    assert bound_ms(shape, "fp32", Peaks(1.0, 1e-6, "")) == (pytest.approx(93_600.0), "memory")


def test_jobs_give_results_errors_or_nothing():
    found = in_processes(math.sqrt, [9.0, -1.0, 16.0], 600.0)
    assert found[0] == 3.0 and found[2] == 4.0 and isinstance(found[1], ValueError)
    assert in_processes(time.sleep, [10_000.0], 0.0) == {}


AIM = Aim("half", False, (64, 512, 512, 4, 2), "cpu")


def cost(entry):
    """Milliseconds of an entry, as if each tile had one best form and rows were all that several share."""
    best = {"columns": 64, "depth": 128, "num_warps": 4, "num_stages": 4}
    each = (abs(math.log2(getattr(tile, name) / value)) for tile in entry for name, value in best.items())
    return 10 + sum(each) + 5 * abs(math.log2(entry.up.rows / 64))


def climbed(table, errors=lambda entries: dict.fromkeys(range(len(entries)), 0.0)):
    return climb(
        table, lambda entry: [*neighbours(entry, AIM)], errors, lambda a, b: cost(a) - cost(b), "half", math.inf
    )


def test_a_climb_finds_the_best_tiles():
    table = tiles.entry_of("sm_90", "half", few=False)
    best = climbed(table).best
    assert {astuple(tile)[1:] for tile in best} == {(64, 128, 4, 4)}
    assert {tile.rows for tile in best[:5]} == {64}
    assert cost(best) == 10 < cost(table)


def test_a_climb_takes_nothing_that_is_wrong_or_does_not_run():
    table = tiles.entry_of("sm_90", "half", few=False)
    stays = climbed(table, lambda entries: {n: 0.5 if n % 2 else ValueError() for n in range(len(entries))})
    assert stays.best == table and len(stays.wrong) == len([*neighbours(table, AIM)]) // 2
    assert climbed(table, lambda entries: {}).best == table


def test_neighbours_differ_in_one_number():
    table = tiles.entry_of("sm_90", "half", few=False)
    found = [*neighbours(table, AIM)]
    assert len({*found}) == len(found) > 40 and table not in found
    for entry in found:
        assert len({tile.rows for tile in entry[:5]}) == 1
        both = [(astuple(old), astuple(new)) for old, new in zip(table, entry, strict=True)]
        numbers = [old for old, new in both for a, b in zip(old, new, strict=True) if a != b]
        assert len(numbers) == 1 or (len(numbers) == 5 and entry.up.rows != table.up.rows)


def test_an_entry_is_printed_as_it_stands_in_the_table():
    entry = tiles.entry_of("sm_80", "tf32", few=True)
    assert eval(text(entry), {"Entry": Entry, "Tile": Tile}) == entry
    assert text(entry) in (ROOT / "kernels/tiles.py").read_text()
    assert text(entry._replace(up=replace(entry.up, depth=64))) not in (ROOT / "kernels/tiles.py").read_text()
