"""conf/router/: each router is a choice, `router=NAME`, with its own options and their defaults."""

import importlib
from dataclasses import asdict, fields, is_dataclass

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore

from foreroute.engine.config import Config, MoEConfig, to_plain
from foreroute.engine.config.enums import Growth
from foreroute.engine.config.model import router_names
from foreroute.engine.config.unused_options import rules, unused
from foreroute.engine.errors import UserError
from foreroute.engine.routing.methods import method_of
from foreroute.launch.start.arguments import known_to, ready, swept
from foreroute.launch.start.config_files import compose_run
from foreroute.launch.start.help import CONF, groups_of, head_comment, help_text

FILES = {path.stem: path for path in (CONF / "router").glob("*.yaml")}
KNOWN = known_to(CONF, "train", Config)


def composed(*options):
    ConfigStore.instance().store("schema", Config)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose_run(list(options))


def option_defaults(name):
    """The defaults that the method's own dataclass has, by the module that reads it."""
    method = method_of(MoEConfig(router=name))
    module = importlib.import_module(method.__module__)
    kinds = [kind for kind in vars(module).values() if is_dataclass(kind) and kind.__module__ == module.__name__]
    kinds = [kind for kind in kinds if fields(kind) and all("help" in field.metadata for field in fields(kind))]
    return {name: value for kind in kinds for name, value in to_plain(kind()).items()}


def test_every_router_is_a_choice():
    assert sorted(FILES) == sorted(router_names())


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_choice_composes_with_the_defaults_of_its_options(name):
    config = composed("experiment=debug", "model.pre_norm=true", f"router={name}")  # which strata need
    assert config.moe.router == name
    text = FILES[name].read_text()
    assert text.startswith("# @package moe\n") and head_comment(FILES[name])[0].isupper()
    assert config.moe.options == yaml.safe_load(text).get("options", {})
    if not config.moe.dense:
        method = method_of(config.moe)
        defaults = option_defaults(name)
        assert config.moe.options == defaults
        assert ("options" in method.uses) == bool(defaults)


def test_a_choice_goes_over_the_experiment_and_an_option_over_the_choice():
    quickstart = composed("experiment=quickstart")
    assert quickstart == composed() and quickstart.moe.router == "hashed"
    for options in (["router=frozen", "experiment=quickstart"], ["moe.router=frozen"]):
        found = composed(*options).moe
        assert found.router == "frozen"
        assert (found.experts, found.expert_width) == (quickstart.moe.experts, quickstart.moe.expert_width)
    assert composed("router=frozen", "moe.router=learned").moe.router == "learned"


def test_own_options_are_typed_as_any_others():
    given = ["router=given", "moe.options.file=a=b.npy", "moe.options.least=0", "moe.options.valid_file=null"]
    found = composed(*given).moe.options
    assert found == {"file": "a=b.npy", "valid_file": None, "test_file": None, "least": 0}


def test_a_sweep_varies_them():
    given = ready(["router=hashed,frozen", "moe.options.least=0,1", "moe.options.sizes=[1,2]"], KNOWN, sweep=True)
    assert given == ["router=hashed,frozen", "++moe.options.least=0,1", "++moe.options.sizes=[1,2]"]
    assert swept(given) == {"router", "moe.options.least"}


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("router=package.module:Class", "router=package.module:Class: takes a choice; write moe.router="),
        ("router=[hashed]", "router=[hashed]: takes one choice, without brackets"),
        ("router=", "router=: has no value; --help lists the choices"),
        ("moe.option.least=1", "moe.option.least=1: no such option"),
    ],
)
def test_what_cannot_be_meant_is_one_line(option, line):
    with pytest.raises(UserError) as error:
        ready([option], KNOWN)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_own_options_of_a_router_without_any_are_reported():
    config = Config(moe=MoEConfig(router="hashed", options={"least": 1}))
    assert config.schedule.growth is Growth.constant
    found = unused(rules(config, method_of(config.moe).uses, {}), ["moe.options.least", "moe.rows"])
    assert found == {"moe.options.least": "moe.router=hashed"}


def test_the_help_lists_the_choices():
    values = {field.name: asdict(getattr(Config(), field.name)) for field in fields(Config)}
    text = help_text(CONF, "train", Config, values, width=100, topics=["router"])
    assert all(f"  {name} " in text for name in FILES)


@pytest.mark.parametrize("program", ["train", "certify", "tables"])
def test_programs_with_an_experiment_have_a_router(program):
    assert "router" in groups_of(CONF / f"{program}.yaml")
