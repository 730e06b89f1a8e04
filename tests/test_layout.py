"""The layering launch -> engine -> kernels, and that the three names mean the folders of this checkout."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "engine": {"kernels", "engine"},
    "launch": {"kernels", "engine", "launch"},
}
ONLY_IN = {
    "hydra": {
        "launch/cli.py",
        "launch/failures.py",
    },  # failures: their exceptions become lines there
    "omegaconf": {"launch/cli.py", "launch/failures.py"},
    "deepspeed": {"engine/deepspeed_adapter.py"},
    "wandb": {"engine/wandb_run.py", "launch/testing_wandb.py"},
    "wandb_workspaces": {"launch/dashboard.py"},
}


def imports(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def faults(name, source):
    folder = name.split("/")[0]
    for module in imports(source):
        if module in MAY_IMPORT and module not in MAY_IMPORT[folder]:
            yield f"{name} imports {module}"
        if module in ONLY_IN and name not in ONLY_IN[module]:
            yield f"{name} imports {module}"


def test_imports_point_one_way():
    found = []
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("*.py"):
            found += faults(path.relative_to(ROOT).as_posix(), path.read_text())
    assert found == []


def test_planted_faults_are_seen():
    assert list(faults("kernels/x.py", "from engine.config import Config"))
    assert list(faults("engine/x.py", "def f():\n    import launch.cli"))
    assert list(faults("engine/x.py", "import deepspeed"))
    assert not list(faults("engine/x.py", "import kernels"))


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_the_name_is_this_folder(name):
    assert Path(importlib.import_module(name).__file__).parent == ROOT / name
