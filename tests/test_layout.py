"""The house: which way imports point, that no files import each other in a circle, one import root, and how full a room
is."""

import ast
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS: dict[str, list[set[str]]] = {  # from the ground up; rooms of one floor do not import each other
    "engine": [
        {"errors", "tracing"},
        {"sealed_files", "nested", "ahead"},
        {"config"},
        {"parallel"},
        {"routing"},
        {"ngram_tables"},
        {"moe"},
        {"data"},
        {"model"},
        {"optim"},
        {"metrics", "evaluation", "checkpoint", "finetune", "convert"},
        {"profiling", "plug_in", "compress"},
        {"certificate", "train", "hugging_face"},
        {"replay"},
        {"testing"},
    ],
    "launch": [
        {"start"},
        {"page"},
        {"runs"},
        {
            "certify",
            "convert",
            "report",
            "study",
            "analyse",
            "compress",
            "dashboard",
            "evaluate",
            "finetune",
            "generate",
            "prepare",
            "record",
            "replay",
            "tables",
            "train",
        },
        {"testing"},
    ],
}
MAY_IMPORT = {"kernels": {"kernels"}, "engine": {"kernels", "engine"}, "launch": {"kernels", "engine", "launch"}}
ONLY_IN = {
    "hydra": ("launch/start/",),
    "omegaconf": ("launch/start/",),
    "deepspeed": ("engine/optim/",),
    "transformers": ("engine/hugging_face/",),
    "wandb": ("engine/metrics/wandb_run.py", "launch/testing/"),
    "wandb_workspaces": ("launch/dashboard.py",),
}
OPENINGS = {"Give", "Gives", "Say", "Says", "Tell", "Tells", "What"}  # a docstring starts with none of them
PROTOCOL = {  # of engine/routing/: what examples/routers/ may use
    *(
        "planned_router",
        "live_router",
        "row_sets",
        "plan",
        "method_options",
        "losses",
        "tables",
        "ngram_rows",
        "hashing",
    )
}
MOST_FILES = 12  # beside each other in a folder
OF_METHODS = {"engine/routing/planned", "engine/routing/live"}  # which have a file for each method
MOST_LINES_OF_A_STEP = 45  # of train_step: what is measured is attached from outside
MOST_WHOLE_CONFIGS = 15  # parameters and fields that are a whole Config: a part takes the sections that it reads


def sources(folders=tuple(MAY_IMPORT)):
    return {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def imports(source):
    """Dotted names that a source imports, of names from a module the module and the name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(folder, name):
    """The floor of a room, or of a file that lies beside rooms; None: no rule."""
    for number, rooms in enumerate(FLOORS.get(folder, [])):
        if name in rooms:
            return number
    return None


def faults(name, source):
    folder, inside = name.split("/", 1)
    room = inside.split("/")[0].removesuffix(".py")
    for module in imports(source):
        first, *rest = module.split(".")
        if first in MAY_IMPORT:
            yield f"{name} imports {module} without its root"
        if first in ONLY_IN and not name.startswith(ONLY_IN[first]):
            yield f"{name} imports {module}"
        if first != "foreroute" or not rest:
            continue
        if rest[0] not in MAY_IMPORT[folder]:
            yield f"{name} imports {module}, which points up"
        elif rest[0] == folder and len(rest) > 1 and rest[1] != room:
            here, there = floor_of(folder, room), floor_of(folder, rest[1])
            if here is not None and there is not None and there >= here:
                yield f"{name} imports {module}, which is no floor below"


def graph(found):
    """The files that each file imports."""
    modules = {f"foreroute.{name[:-3].replace('/', '.')}".removesuffix(".__init__"): name for name in found}
    arrows = {}
    for name, source in found.items():
        full = [modules.get(module) or modules.get(module.rpartition(".")[0]) for module in imports(source)]
        arrows[name] = {other for other in full if other not in (None, name)}
    return arrows


def circle(arrows):
    """Files that import each other in a circle; () if there are none."""
    left = dict(arrows)
    while left:
        free = [name for name, others in left.items() if not others & left.keys()]
        if not free:
            return tuple(sorted(left))
        for name in free:
            del left[name]
    return ()


def test_imports_point_one_way():
    assert [fault for name, source in sources().items() for fault in faults(name, source)] == []


def test_every_room_has_a_floor():
    for folder in FLOORS:
        rooms = {path.name.removesuffix(".py") for path in (ROOT / folder).iterdir() if path.suffix in ("", ".py")}
        assert rooms - {"__init__", "__pycache__", "recipes"} == set().union(*FLOORS[folder])


def test_no_files_import_each_other_in_a_circle():
    assert circle(graph(sources())) == ()


def test_no_function_hides_a_module():
    """`from foreroute.kernels import x` is one thing or the other."""
    for name, source in sources().items():
        if name.endswith("__init__.py"):
            here = (ROOT / name).parent
            beside = {path.stem for path in here.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
            nodes = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)]
            assert beside.isdisjoint(alias.asname or alias.name for node in nodes for alias in node.names), name


def test_a_step_shows_its_algorithm():
    tree = ast.parse((ROOT / "engine/train/step.py").read_text())
    (step,) = [node for node in tree.body if getattr(node, "name", "") == "train_step"]
    assert step.end_lineno - step.lineno + 1 <= MOST_LINES_OF_A_STEP


def whole_configs(source):
    """Names of the parameters and fields of a source that are annotated as a whole Config, or one that may be None."""
    for node in ast.walk(ast.parse(source)):
        kind = getattr(node, "annotation", None)
        if kind is not None and ast.unparse(kind).split(" | ")[0] == "Config":
            yield node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)


def test_parts_take_their_sections():
    everything = sources((*MAY_IMPORT, "benchmarks"))
    found = [f"{name}: {config}" for name, source in everything.items() for config in whole_configs(source)]
    assert len(found) <= MOST_WHOLE_CONFIGS, "\n".join(found)


def test_a_whole_config_is_seen():
    source = "def f(a: Config, *, b: Config | None = None, c: MoEConfig, d: list[Config]): ...\nclass C:\n    e: Config"
    assert sorted(whole_configs(source)) == ["a", "b", "e"]


def test_a_room_is_not_crowded():
    names = sources((*MAY_IMPORT, "benchmarks"))
    crowded = Counter(name.rpartition("/")[0] for name in names if not name.endswith("__init__.py"))
    assert {folder: count for folder, count in crowded.items() if count > MOST_FILES and folder not in OF_METHODS} == {}


def test_each_room_says_what_it_is():
    for folder in {name.rpartition("/")[0] for name in sources()}:
        assert ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())), folder


def foreign(source):
    """Modules that a reference imports besides Python's own, torch and numpy."""
    return {module.split(".")[0] for module in imports(source)} - {*sys.stdlib_module_names, "torch", "numpy"}


def test_references_of_methods_know_nothing_of_the_program():
    found = {path.name: foreign(path.read_text()) for path in (ROOT / "tests/references").glob("*.py")}
    assert all(names == set() for names in found.values()), found
    assert foreign("import math, torch\nfrom numpy.linalg import norm") == set()
    assert foreign("from foreroute.engine.routing.plan import Plan\nimport scipy") == {"foreroute", "scipy"}


def openings(source):
    """The first words of a source's docstrings, those of attributes among them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value.split(maxsplit=1)[0].rstrip(",:")


def test_docstrings_start_with_a_plain_verb():
    files = {
        **sources(),
        **{p.relative_to(ROOT).as_posix(): p.read_text() for p in (ROOT / "benchmarks").rglob("*.py")},
    }
    found = {name: OPENINGS.intersection(openings(source)) for name, source in files.items()}
    assert {name: words for name, words in found.items() if words} == {}


def test_a_planted_opening_is_seen():
    source = 'def f():\n    """Give a number."""\n\nX = 1\n"""What it is."""\n\nclass A:\n    """Returns."""'
    assert OPENINGS.intersection(openings(source)) == {"Give", "What"}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kernels/x.py", "from foreroute.engine.config import Config"),
        ("engine/moe/x.py", "def f():\n    import foreroute.launch.train"),
        ("engine/moe/x.py", "from foreroute.engine.data.loader import PlannedLoader"),
        ("engine/metrics/x.py", "from foreroute.engine import checkpoint"),
        ("engine/metrics/x.py", "from foreroute.engine.train.step import train_step"),
        ("engine/train/x.py", "from foreroute.engine.certificate.check import Check"),
        ("engine/tracing.py", "import foreroute.engine.config.run"),
        ("launch/page/x.py", "from foreroute.launch.runs.folder import open_run"),
        ("engine/data/x.py", "import deepspeed"),
        ("engine/data/x.py", "from engine.config import Config"),
        ("launch/train.py", "import kernels"),
    ],
)
def test_planted_faults_are_seen(name, source):
    assert list(faults(name, source))


def test_what_is_allowed_is_no_fault():
    assert not list(faults("engine/data/x.py", "from foreroute.engine.config import Config\nimport foreroute.kernels"))
    assert not list(faults("engine/data/x.py", "from foreroute.engine.data.corpus import prepare\nimport numpy"))


def test_a_planted_circle_is_seen():
    found = {
        "engine/a.py": "from foreroute.engine.b import x",
        "engine/b.py": "from foreroute.engine import c",
        "engine/c.py": "def f():\n    import foreroute.engine.a",
        "engine/d.py": "import foreroute.engine.a",
    }
    assert circle(graph(found)) == tuple(found)
    assert circle(graph({**found, "engine/c.py": ""})) == ()


@pytest.mark.parametrize("name", [*MAY_IMPORT, "conf"])
def test_the_root_has_links_to_the_folders(name):
    link = ROOT / "foreroute" / name
    assert link.is_symlink() and not link.readlink().is_absolute() and link.resolve() == ROOT / name


def beyond_the_protocol(source):
    """What a router of the examples imports of the program besides the protocol, options and errors."""
    rooms = "config", "errors", *(f"routing.{name}" for name in PROTOCOL)
    public = tuple(f"foreroute.engine.{room}." for room in rooms)
    return [module for module in imports(source) if module.startswith("foreroute") and not module.startswith(public)]


def test_routers_of_the_examples_use_the_protocol_alone():
    found = {path.name: beyond_the_protocol(path.read_text()) for path in (ROOT / "examples/routers").glob("*.py")}
    assert len(found) > 2 and not any(found.values()), found
    planted = (
        "import numpy\nfrom foreroute.engine.errors import require\nfrom foreroute.engine.moe.layer import MoELayer"
    )
    assert beyond_the_protocol(planted) == ["foreroute.engine.moe.layer.MoELayer"]


def test_nothing_has_bare_imports():
    """Each module would be loaded twice, and its operators registered twice."""
    for path in (path for folder in ("tests", "benchmarks", "examples") for path in ROOT.glob(f"{folder}/**/*.py")):
        bare = [module for module in imports(path.read_text()) if module.split(".")[0] in MAY_IMPORT]
        assert bare == [], path
