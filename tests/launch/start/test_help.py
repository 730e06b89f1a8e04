"""What --help says, against the configuration files and the dataclasses themselves."""

import dataclasses
import importlib
import re
import sys
import textwrap
import typing
from enum import Enum
from pathlib import Path

import pytest
import torch
import yaml

import foreroute
from foreroute.engine.config import Config, MoEConfig
from foreroute.engine.errors import UserError
from foreroute.launch.start.help import choices_of, groups_of, head_comment, help_text, sections
from foreroute.launch.train import TrainArgs

ROOT = Path(__file__).resolve().parents[3]
CONF = ROOT / "conf"
PROGRAMS = sorted(path.stem for path in CONF.glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.fixture
def helped(run, monkeypatch):
    """The help of a program at a width: all of it, unless topics are given."""

    def helped(program, *options, width=80, topics=("all",)):
        monkeypatch.setenv("COLUMNS", str(width))
        done = run(program, *options, "--help", *topics)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return done.stdout

    return helped


def entries(text):
    """Every option of a help text with its value and the text behind it, in one line."""
    found = {}
    for match in re.finditer(r"^  ([\w.]+)=(\S*)\s((?:.*\n)(?: {10,}.*\n)*)", text, re.MULTILINE):
        found[match[1]] = (match[2], " ".join(match[3].split()))
    return found


def whole_words(text):
    """The words of a text, put together again where a line ends behind a hyphen."""
    return re.sub(r"-\n\s*", "-", text).split()


def options_of(schema):
    """Every option of a dataclass with its type."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from ((f"{field.name}.{name}", inner) for name, inner in options_of(kind))
        else:
            yield field.name, kind


def test_every_option_is_there_with_what_it_may_be(helped):
    found = entries(helped("train"))
    assert sorted(found) == sorted(name for name, _ in options_of(TrainArgs))
    for name, kind in options_of(TrainArgs):
        kinds = [kind, *typing.get_args(kind)]
        allowed = re.search(r"\[([^\[\]]+)\]$", found[name][1])
        assert allowed, name
        assert ("null" in allowed[1]) == (type(None) in kinds), name
        for enum in (k for k in kinds if isinstance(k, type) and issubclass(k, Enum)):
            assert re.split(r" \| |, ", allowed[1])[: len(enum)] == [*enum.__members__], name


def test_the_bounds_are_those_that_hold(helped):
    found = entries(helped("train", "experiment=debug"))
    config = Config()
    checked = 0
    for name, (_, text) in found.items():
        bound = re.search(r"at least (\d+)", text)
        if bound is None or name == "certificate":
            continue
        section, option = name.split(".")
        with pytest.raises(UserError, match=re.escape(name)):
            dataclasses.replace(getattr(config, section), **{option: int(bound[1]) - 1})
        checked += 1
    assert checked > 40
    assert "at most" not in found["model.dropout"][1] and "below 1" in found["model.dropout"][1]


def test_values_are_those_of_the_experiment(helped):
    assert entries(helped("train"))["data.streams"][0] == "16"
    found = entries(helped("train", "experiment=debug", "moe.spread=1,2"))
    assert found["data.streams"][0] == "4" and found["eval.k"][0] == "[1,2,4]"
    assert found["moe.spread"][0] == "2.0" and found["corpus.path"][0] == "null"
    assert found["train.resume"][0] == "false" and found["moe.router"][0] == "hashed"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_a_help_that_fits(helped, program):
    text = helped(program)
    too_long = [line for line in text.splitlines() if len(line) > 80]
    assert too_long == []
    assert "\x1b" not in text and not re.search(r"[ \t]\n", text)
    words = " ".join(text.split())
    assert " ".join(head_comment(CONF / f"{program}.yaml").split()) in words
    assert f"python -m launch.{program}" in text
    silent = [name for name, (_, meaning) in entries(text).items() if meaning.startswith("[")]
    assert silent == []  # every option says what it means
    defaults = yaml.safe_load((CONF / f"{program}.yaml").read_text())["defaults"]
    names = [name for item in defaults if isinstance(item, dict) for name in item]
    groups = [name for name in names if "hydra" not in name]
    for group in groups:
        assert f"\n{group}=CHOICE:\n" in text, group
        for path in (CONF / group).rglob("*.yaml"):
            choice = str(path.relative_to(CONF / group))[: -len(".yaml")]
            assert re.search(rf"^  {choice}\s", text, re.MULTILINE), path
    assert len(re.findall(r"=CHOICE:", text)) == len(groups)


def test_every_experiment_is_listed_with_its_line(helped):
    words = " ".join(helped("train").split())
    for name in EXPERIMENTS:
        comment = [
            line.lstrip("# ")
            for line in (CONF / f"experiment/{name}.yaml").read_text().splitlines()
            if line.startswith("#") and "@package" not in line
        ]
        sentence = " ".join(comment).split(". ")[0].rstrip(".")
        assert f" {name} {sentence}." in words
        assert len(sentence) <= 80, sentence


@pytest.mark.parametrize("width", [40, 60, 100])
def test_no_word_is_broken_at_any_width(helped, width):
    text = helped("train", width=width)
    examples = [line for line in text.splitlines() if re.match(r"  (python -m|\.\.\.) ", line)]
    labels = [line for line in text.splitlines() if re.fullmatch(r"  [\w.]+=\S*", line)]
    for line in text.splitlines():
        assert len(line) <= width or line in examples or line in labels, line
    wide = helped("train", width=80)
    assert whole_words(text) == whole_words(wide)
    assert whole_words(text) != whole_words(wide.replace("experts", "exp erts"))


@pytest.mark.parametrize("width", [80, 100, 300])
@pytest.mark.parametrize("program", PROGRAMS)
def test_without_a_group_it_is_one_screen(helped, program, width):
    text = helped(program, width=width, topics=())
    examples = [line for line in text.splitlines() if re.match(r"  (python -m|\.\.\.) ", line)]
    assert len(text.splitlines()) <= 30 and len(examples) <= 5
    assert all(len(line) <= min(width, 100) or line in examples for line in text.splitlines())
    everything = helped(program, width=width)
    titles = {title.removesuffix("=CHOICE") for title in re.findall(r"^(\S+):$", everything, re.MULTILINE)}
    if "\ngroups: " not in text:
        assert text == everything
        return
    listed = set(re.findall(r"^  (\w+)  ", text.partition("\ngroups: ")[2], re.MULTILINE))
    assert listed | ({"options"} if "\noptions:\n" in text else set()) == titles


def test_a_group_alone(helped):
    whole = helped("train", "experiment=debug")
    for topic in ("optim", "moe", "options", "flags"):
        text = helped("train", "experiment=debug", topics=[topic])
        assert text.splitlines()[0] == f"{topic}:" and [*entries(text)] == [
            name
            for name in entries(whole)
            if name.startswith(f"{topic}.") or (topic, name) == ("options", "certificate")
        ]
    both = helped("train", topics=["corpus"])
    assert "corpus=CHOICE:\n" in both and "\ncorpus:\n" in both and set(entries(both)) >= {"corpus.path"}
    two = helped("train", "experiment=debug", topics=["data", "moe.spread"])
    assert set(entries(two)) == {*(name for name in entries(whole) if name.startswith("data.")), "moe.spread"}
    assert entries(two)["data.streams"] == entries(whole)["data.streams"]


def test_choices_in_a_folder_are_one_line_until_asked_for(helped):
    text = helped("train", topics=["experiment"], width=100)
    studies = sorted(path.stem for path in (CONF / "experiment/study").glob("*.yaml"))
    assert re.findall(r"^  (\S+)  ", text, re.MULTILINE) == [*EXPERIMENTS, "paper/NAME", "study/NAME"]
    assert f" {len(studies)} choices: --help experiment/study\n" in text
    text = helped("train", topics=["experiment/study"], width=100)
    assert re.findall(r"^  study/(\S+)  ", text, re.MULTILINE) == studies and "paper/" not in text


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        ("optm", ["did you mean optim?", "allowed: corpus, experiment, "]),
        ("moe.spred", ["did you mean moe.spread?"]),
        ("experiment/gone", ["allowed: "]),
        ("quickstart", ["allowed: "]),
    ],
)
def test_a_wrong_group_is_one_line_and_code_2(run, topic, words):
    done = run("train", "--help", topic)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and f"--help {topic}: no such group; " in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_version_is_ours(run, program):
    done = run(program, "--version")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == f"foreroute {foreroute.__version__} (PyTorch {torch.__version__})\n"


def test_a_wrong_choice_is_one_line_and_code_2(run):
    done = run("train", "experiment=nope", "--help")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "nope" in done.stderr


def test_hydras_own_flags_go_on_working(run):
    done = run("train", "experiment=debug", "--cfg", "job")
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["data"]["streams"] == 4
    done = run("train", "--hydra-help")
    assert done.returncode == 0 and "--multirun" in done.stdout


def test_the_parts_of_a_small_program(tmp_path):
    """A program of two options and one group, whose help can be read whole."""
    (tmp_path / "paint.py").write_text(
        textwrap.dedent('''
        from dataclasses import dataclass, field
        from enum import Enum
        from typing import Any

        from foreroute.engine.config.option import option

        class Colour(Enum):
            """What colour it gets."""

            red = 1
            blue = 2

        @dataclass
        class Size:
            """How large it is."""

            width: float = option(2.0, "", at_least=1)

        @dataclass
        class Paint:
            """Options."""

            colour: Colour | None = None
            coats: list[int] = option([], "None of them is dry: 100% wet.")
            size: Size = field(default_factory=Size)
            lid: Any = None
        ''')
    )
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool/brush.yaml").write_text("# @package _global_\n# A brush. It has hair.\na: 1\n# No head.\n")
    (tmp_path / "paint.yaml").write_text(
        "# Paint it.\n#\n#   paint now\ndefaults:\n  - schema\n  - tool: brush\n  - override hydra/job_logging:"
        " disabled\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        schema = importlib.import_module("paint").Paint
        values = {"colour": None, "coats": [1, 2], "size": {"width": 2.0}, "lid": None}
        written = help_text(tmp_path, "paint", schema, values, width=80)
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("paint", None)
    assert groups_of(tmp_path / "paint.yaml") == ["tool"]
    assert choices_of(tmp_path / "tool") == {"brush": "A brush."}
    assert written.startswith("Paint it.\n\n  paint now\n\ntool=CHOICE:\n  brush           A brush.\n")
    assert "\n  colour=null     What colour it gets. [red | blue | null]\n" in written
    assert "\n  coats=[1,2]     null of them is dry: 100% wet. [list of whole numbers]\n" in written
    assert "\n  lid=null        [any value]\n" in written
    assert "\nsize:\n  How large it is.\n\n  size.width=2.0  [number, at least 1]\n" in written


def test_sections_tell_an_option_that_has_no_value():
    values = dict.fromkeys((field.name for field in dataclasses.fields(MoEConfig)), "???")
    ((_, _, options),) = sections(MoEConfig, values, "moe")
    assert options["moe.rows="].endswith("[whole number, at least 1, needed]")
