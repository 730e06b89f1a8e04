"""Which tests run, and in which order (tests/README.md)."""

import gc
import os
from pathlib import Path

import pytest
import torch

import foreroute.launch  # noqa: F401  (puts the checkout behind other packages on the path)

ROOT = Path(__file__).parent
LONG_FIRST = [  # files of more than ten seconds, so that no process is left alone with one of them in the end
    "benchmarks/test_gpu_check.py",
    "benchmarks/test_bench_certify.py",
    "benchmarks/test_bench_faults.py",
    "benchmarks/test_bench_metrics.py",
    "benchmarks/test_memory.py",
    "benchmarks/test_exchange.py",
    "engine/train/test_composition.py",
    "launch/test_ranks.py",
    "launch/start/test_cli.py",
    "engine/train/test_trainer.py",
    "engine/train/test_training_on_ranks.py",
    "engine/train/test_step.py",
    "engine/parallel/test_watchdog.py",
    "engine/certificate/test_against_runs.py",
    "launch/test_experiments.py",
    "launch/test_finetune.py",
    "launch/start/test_process.py",
    "launch/report/test_report_browser.py",
    "engine/plug_in/test_plug_in_on_ranks.py",
    "engine/checkpoint/test_topologies.py",
    "launch/test_dashboard.py",
    "launch/test_certified_runs.py",
    "launch/study/test_preset.py",
    "kernels/test_static_gate.py",
    "engine/moe/test_layer_on_ranks.py",
    "engine/profiling/test_profiler.py",
    "engine/metrics/test_metrics_on_ranks.py",
    "launch/runs/test_sweep_table.py",
    "launch/report/test_report.py",
]


LINEAR = torch.nn.functional.linear


@pytest.fixture(autouse=True)
def as_before():
    """A program that runs in this process may set PyTorch's threads, which would slow the tests after it; DeepSpeed at
    ZeRO-3 replaces a function of PyTorch's by one that cannot be compiled. Programs and libraries set variables of the
    environment: a process that a later test starts would take RANK for its place in a job."""
    threads, environ = torch.get_num_threads(), dict(os.environ)
    yield
    torch.set_num_threads(threads)
    torch.nn.functional.linear = LINEAR
    for name in os.environ.keys() - environ.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(environ)


def pytest_collection_finish():
    """What was imported stays for good: whole collections need not look at it (8% of the tests' time)."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config, items):
    if "cluster" not in config.option.markexpr:
        _skip_clusters(items)
    order = {name: number for number, name in enumerate(LONG_FIRST)}
    items.sort(key=lambda item: order.get(item.path.relative_to(ROOT).as_posix(), len(order)))


def _skip_clusters(items):
    """Tests on simulated machines run only when asked for; otherwise the summary says how."""
    skip = pytest.mark.skip(reason="on simulated machines: `make test-cluster`, or -m cluster")
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(skip)
