"""Each method has a card, a file in conf/router/ and a test of its formula; references know nothing of foreroute."""

import ast
from pathlib import Path

import pytest

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.model import DENSE, router_names
from foreroute.engine.routing.method_options import Card
from foreroute.engine.routing.methods import method_of

ROOT = Path(__file__).resolve().parents[4]
METHODS = [name for name in router_names() if name != DENSE]
ALLOWED = {"torch", "numpy"}  # of a reference, besides the standard library
STANDARD = {"collections", "dataclasses", "fractions", "functools", "itertools", "math", "typing", "unicodedata"}


def imports(source):
    """The packages that a source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.split(".")[0]


def files_with_tests_of(name):
    """Files of tests that import a method's module and have tests of published formulas."""
    for path in (ROOT / "tests" / "engine").rglob("test_*.py"):
        text = path.read_text()
        if f".{name} import" in text and ("planned" in text or "live" in text) and "pytest.mark.method" in text:
            yield path


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_whole(name):
    method = method_of(MoEConfig(router=name))
    assert isinstance(method.card, Card) and "card" in vars(method)
    assert all(text and not text.endswith(".") and text.isascii() for text in method.card)
    assert (ROOT / "conf" / "router" / f"{name}.yaml").exists()
    assert list(files_with_tests_of(name)), "no test holds it to its formula"


def test_references_import_torch_and_numpy_only():
    files = sorted((ROOT / "tests" / "references").glob("*.py"))
    found = {path.name: set(imports(path.read_text())) - ALLOWED - STANDARD for path in files}
    assert len(found) > 5 and {name: packages for name, packages in found.items() if packages} == {}


def test_another_import_is_seen():
    """Negative control."""
    source = "import torch.nn as nn\nfrom foreroute.engine import moe\ndef f():\n    import scipy\nfrom . import x"
    assert set(imports(source)) - ALLOWED == {"foreroute", "scipy", "."}
