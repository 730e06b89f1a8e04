"""Nothing that a program reads from a disk is unpickled: no call that could is in engine/, kernels/ or launch/."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package",
    "yaml.load",
    "yaml.unsafe_load",
    "pandas.read_pickle",
}


def unpickling(source):
    """Lines of a source text that could unpickle a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None)
            full = [f"{module}.{name}" for name in names] + [module] if module else names
            if any(name.split(".")[0] in MODULES or name in CALLS for name in full):
                found.append(node.lineno)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe = any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords)
            numpy = name in ("np.load", "numpy.load") or name.endswith(".open_memmap")
            if name in CALLS or (numpy and not safe):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("folder", ["engine", "kernels", "launch"])
def test_no_file_is_unpickled(folder):
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert len(sources) > 5
    assert {str(path): lines for path in sources if (lines := unpickling(path.read_text()))} == {}


def test_the_search_finds_them():
    """Negative control."""
    bad = [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "torch.load(f, weights_only=True)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "import joblib.parallel",
        "yaml.load(f)",
    ]
    assert [unpickling(line) for line in bad] == [[1]] * len(bad)
    good = ["np.load(f, allow_pickle=False)", "json.loads(f)", "from numpy import load_txt", "save_file(t, f)"]
    assert [unpickling(line) for line in good] == [[]] * len(good)
