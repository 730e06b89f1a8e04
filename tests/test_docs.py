"""What the documentation names is there: files that it links to, experiments, presets, programs and options in its
commands."""

import dataclasses
import importlib.util
import json
import re
import typing
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore

from foreroute.engine.config import Config
from foreroute.launch.start.config_files import compose_run
from foreroute.launch.start.help import groups_of
from foreroute.launch.testing.runs import program_module

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_discussion" not in page.name),
]  # a study's discussion is a part of its page


def _links(page: Path) -> list[str]:
    text = re.sub(r"(?m)^ {4}.*$", "", page.read_text())  # code has brackets of its own
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def missing_from(page: Path) -> list[str]:
    """Name what a page links to or calls and the repository does not have."""
    text = page.read_text()
    wanted = {link: page.parent / link.partition("#")[0] for link in _links(page)}
    groups = {name: name for name in ("experiment", "sweep", "recipe", "router", "ngram_tables")} | {"preset": "study"}
    for option, group in groups.items():
        for name in re.findall(rf"(?<![.\w]){option}=([a-z0-9_/]+)", text):
            wanted[f"{option}={name}"] = ROOT / "conf" / group / f"{name}.yaml"
    for name in re.findall(r"\b(?:launch|benchmarks)(?:\.[a-z_]+)+", text):
        module = ROOT / name.replace(".", "/")
        folder = module / "__main__.py"
        wanted[name] = folder if folder.exists() else module.with_suffix(".py")
    return [name for name, path in wanted.items() if not path.exists()]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_what_a_page_names_is_there(page):
    assert missing_from(page) == []


def _options(schema: type, section: str = "") -> typing.Iterator[str]:
    """Full names of a dataclass's options."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _options(hints[field.name], f"{field.name}.")
        else:
            yield section + field.name


def _program_options(program: str) -> set[str]:
    module = program_module(program)
    (schema,) = (value for name, value in vars(module).items() if name.lower() == f"{program}args")
    groups = groups_of(ROOT / "conf" / f"{program}.yaml")
    routers = [yaml.safe_load(path.read_text()) for path in (ROOT / "conf/router").glob("*.yaml")]
    own = {f"moe.options.{name}" for router in routers for name in router.get("options", {})}
    return {*_options(schema), *groups, *own, "hydra/launcher", "hydra.launcher.n_jobs"}


def _router_options() -> set[str]:
    """The options of all routers' own."""
    modules = [
        importlib.import_module(f"foreroute.engine.routing.{path.parent.name}.{path.stem}")
        for kind in ("planned", "live")
        for path in (ROOT / "engine/routing" / kind).glob("[!_]*.py")
    ]
    own = [value for module in modules for value in vars(module).values() if dataclasses.is_dataclass(value)]
    return {f"moe.options.{item.name}" for kind in own for item in dataclasses.fields(kind) if "help" in item.metadata}


def unknown_options(text: str) -> list[str]:
    """Options that a page gives to a program that does not have them, or names in its text and no run has."""
    found = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if (command := re.search(r"^ {4}.*?\blaunch\.([a-z_]+) (.*)", line)) and "=" in command[2]:
            given = re.findall(r"(?:^|\s)([a-z_./]+)=", re.split(r"\s#", command[2])[0])
            known = _program_options(command[1]) | _router_options()
            found += [f"launch.{command[1]} {name}" for name in given if name not in known]
    sections = {field.name for field in dataclasses.fields(Config)}
    for section, name in re.findall(r"`([a-z]+)\.([a-z_]+)(?:=[^`]*)?`", text):
        if section in sections and f"{section}.{name}" not in _options(Config):
            found.append(f"{section}.{name}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_the_options_in_its_commands_and_sentences_exist(page):
    assert unknown_options(page.read_text()) == []


def test_a_wrong_option_is_found():
    text = """    $P -m launch.train experiment=debug moe.pak=8 train.name=x   # moe.pack=8
    $P -m launch.train moe.options.file=x moe.options.fil=x
    $P -m launch.report run=x k=3
`moe.spred=2` and `train.steps`"""
    assert unknown_options(text) == [
        "launch.train moe.pak",
        "launch.train moe.options.fil",
        "launch.report k",
        "moe.spred",
    ]


def test_a_wrong_name_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[gone](gone.md) [page](page.md) `launch.tarin experiment=quickstart` preset=smal\n")
    assert missing_from(page) == ["gone.md", "preset=smal", "launch.tarin"]


def test_the_readme_leads_to_every_page():
    linked = {(page.parent / link).resolve() for page in PAGES for link in _links(page)}
    assert [page.name for page in PAGES[1:] if page not in linked] == []


def test_the_tour_of_the_house_links_to_what_is_there():
    tour = ROOT / "CONTRIBUTING.md"
    assert [link for link in _links(tour) if not (ROOT / link).exists()] == []


def _program_of(page: str) -> ModuleType:
    """A program of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{Path(page).stem}", ROOT / "docs" / page)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_page_has_every_public_name():
    api = _program_of("api.py")
    assert (ROOT / "docs/api.md").read_text() == api.page(), "python docs/api.py writes it anew"


def test_a_name_that_is_new_or_gone_changes_the_api_page():
    api = _program_of("api.py")
    module = ModuleType("house")
    exec("class Door: ...\ndef open_it(): ...\ndef _hidden(): ...\nNUMBER = 3", module.__dict__)
    for value in (module.Door, module.open_it):
        value.__module__ = "house"
    module.Path = Path  # another module's
    assert api.public_names(module) == ["Door", "open_it"]
    module.__all__ = ["NUMBER", "__version__"]
    assert api.public_names(module) == ["NUMBER"]


def test_the_routers_page_has_every_router():
    routers = _program_of("routers.py")
    assert (ROOT / "docs/routers.md").read_text() == routers.page(), "python docs/routers.py writes it anew"


def test_the_page_of_smaller_models_has_the_measured_numbers():
    compress = _program_of("compress.py")
    found = json.loads(compress.KEPT.read_text())
    assert compress.PAGE.read_text() == compress.page(found), "python docs/compress.py writes it anew"
    found["bpc"]["whole"]["1"] += 0.001
    assert compress.PAGE.read_text() != compress.page(found)
    assert next(line.y[0] for line in compress.picture(found).lines) == found["bpc"]["whole"]["1"]


def test_works_that_are_combinations_are_runs():
    """Their options compose."""
    ConfigStore.instance().store("schema", Config)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for work in _program_of("routers.py").WORKS:
            compose_run(["experiment=quickstart", *work.options.split()])


def test_the_readmes_pictures_are_what_draws_them_and_show_its_table():
    pictures = _program_of("img/pictures.py")
    assert (ROOT / "docs/img/way.svg").read_text() == pictures.way()
    (table,) = pictures.RESULTS.findall((ROOT / "README.md").read_text())
    shown = dict(re.findall(r"^ +(k = \d+|dense twin|order \d) +(\d\.\d{3}) ", table, re.MULTILINE))
    curve = (ROOT / "docs/img/slimming.svg").read_text()
    assert len(shown) == 8 and all(
        re.search(rf">(order \d |dense twin )?{value}</text>", curve) for value in shown.values()
    )


def test_a_run_is_put_into_the_readme():
    pictures = _program_of("img/pictures.py")
    text = (ROOT / "README.md").read_text()
    put = pictures.RESULTS.sub(lambda _: "    nothing", text)
    assert "\n\n    nothing\n\n<!-- end" in put and put.count("\n") < text.count("\n")
    drawn = pictures.slimming({"1": 3.0, "2": 2.5, "4": 2.25}, {"order 2": 2.75})
    places = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', drawn)]
    assert places == sorted(places) and places[1] - places[0] == pytest.approx(2 * (places[2] - places[1]), abs=0.3)
