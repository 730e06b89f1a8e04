"""What a person types reaches the options as it was meant, or is refused with one line that says what works."""

import random
from contextlib import suppress
from dataclasses import dataclass, field, make_dataclass
from typing import Any

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from foreroute.engine.config import Decay
from foreroute.engine.errors import UserError
from foreroute.launch.start.arguments import known_to, quote, ready, swept, unquoted
from foreroute.launch.start.cli import CONF

TEXTS = (
    "def f(x):",
    "a=b,c",
    "it's",
    'say "so"',
    "both ' and \"",
    " blanks ",
    "~|#",
    "${X}",
    "$HOME",
    "${oc}",
    r"a\${X}",
    "back\\",
    "a\\'b",
    r"\\",
    "[1,2]",
    "{a: b}",
    "Grüße, 世界",
    "1e5",
    "1234e56",
    "true",
    "null",
    "0x10",
    "1_000",
    "inf",
    "",
    "%@?!&*;<>",
    "line\nline",
    "a, b",
    "x=[1",
    "it's, that's",
    "choice(a,b)",
    "${a",
    "}{",
    "- a",
    ": b",
    "a: b",
    "# c",
    "'a' and 'b'",
)


@dataclass
class Inner:
    """Options of a section."""

    rate: float = 0.1
    path: str | None = None


@dataclass
class Options:
    """Options of one program."""

    prompt: str = ""
    many: list[int] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    maybe: list[int] | None = None
    steps: int = 1
    flag: bool = False
    decay: Decay = Decay.cosine
    own: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


@pytest.fixture(scope="module")
def known():
    return known_to(CONF, "none", Options)


def compose(schema, *arguments):
    ConfigStore.instance().store("typed", schema)
    with hydra.initialize(None, version_base="1.3"):
        return hydra.compose("typed", list(arguments))


@pytest.fixture
def composed(known):
    """Compose options as a program does."""
    return lambda *arguments: compose(Options, *ready(arguments, known))


def random_texts(count):
    signs = "ab1 .,=:'\"\\${}[]()~|#\nä世"
    draw = random.Random(3)
    return ["".join(draw.choices(signs, k=draw.randrange(1, 9))) for _ in range(count)]


@pytest.mark.parametrize("texts", [TEXTS, random_texts(150)], ids=["by hand", "drawn"])
def test_any_text_is_taken_as_it_is(composed, known, texts):
    """But for quotes around the whole, which mean what is inside."""
    texts = [text for text in texts if unquoted(text.strip()) == text.strip()]
    assert len(texts) > 30
    names = [f"t{i}" for i in range(len(texts))]
    schema = make_dataclass("Texts", [(name, str, "") for name in names])
    given = [f"{name}={text}" for name, text in zip(names, texts, strict=True)]
    found = compose(schema, *ready(given, known_to(CONF, "none", schema)))
    assert [found[name] for name in names] == texts
    assert [unquoted(quote(text)) for text in texts] == texts


def test_hydra_alone_takes_few_of_them():
    """The negative control of the test above."""
    taken = 0
    for text in TEXTS[:8]:
        with suppress(HydraException, OmegaConfBaseException):
            taken += compose(Options, f"prompt={text}").prompt == text
    assert taken == 0


def test_values_that_work_as_they_did(composed):
    assert composed("prompt='def '").prompt == composed('prompt="def "').prompt == "def "
    assert composed("inner.path=null").inner.path is None
    assert composed("prompt=${steps}", "steps=3").prompt == "3"
    assert composed("steps=1_000").steps == composed("steps='1000'").steps == 1000
    assert composed("inner.rate=5").inner.rate == 5
    assert composed("flag=Yes").flag is True
    assert composed("+inner={rate: 2}").inner.rate == 2
    assert composed("decay=constant").decay is Decay.constant


def test_options_whose_names_only_the_router_knows(composed, known):
    assert composed("own.a=3", "own.b=true", "own.c=1e-2").own == {"a": 3, "b": True, "c": 0.01}
    assert composed("own.a=null", "own.b=[1,2]", "own.c='3'").own == {"a": None, "b": [1, 2], "c": "3"}
    assert composed("own.file=a b/{c}=1.npy", "+own.d=x").own == {"file": "a b/{c}=1.npy", "d": "x"}
    assert composed("own={a: 1}").own == {"a": 1}
    assert swept(ready(["own.a=1,2", "own.b=3", "steps=4,5"], known, sweep=True)) == {"own.a", "steps"}


def test_one_value_stands_for_a_list_of_one(composed):
    assert composed("many=4").many == composed("many=[4]").many == [4]
    assert composed("many=1,2").many == composed("many=[1, 2]").many == [1, 2]
    assert composed("many=[]").many == [] and composed("maybe=null").maybe is None
    assert composed("maybe=3").maybe == [3]
    assert composed("tags=a b,c=d").tags == composed("tags=[a b,c=d]").tags == ["a b", "c=d"]
    assert composed("tags=[1e5,true,'x,y']").tags == ["1e5", "true", "x,y"]


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("steps=1e3", "steps=1e3: must be a whole number, written 1000"),
        ("steps=[4]", "steps=[4]: takes one value, no list: steps=4"),
        ("steps=1,2", "steps=1,2: must be a whole number; several values need -m, which runs each"),
        ("steps=range(1,5)", "steps=range(1,5): several values need -m, which runs each"),
        ("steps=", "steps=: must be a whole number"),
        ("many=[1,x]", "many=x in [1,x]: must be a whole number"),
        ("inner.rate=inf", "inner.rate=inf: must be a finite number"),
        ("inner.rate=nan", "inner.rate=nan: must be"),
        ("flag=maybe", "flag=maybe: must be true | false"),
        ("decay=Constant", "did you mean constant?"),
        ("rate=1", "rate=1: no such option; did you mean inner.rate? allowed: "),
        ("inner.rat=1", "inner.rat=1: no such option; did you mean inner.rate? allowed: rate, path"),
        ("inner=1", "inner=1: is a section; its options are inner.rate, inner.path"),
        ("steps", "steps: has no value; write steps=VALUE, without blanks"),
        ("own.a=1,2", "own.a=1,2: takes one value; several values need -m, which runs each"),
        ("=5", "=5: "),
        (f"steps={'9' * 5000}", "999...: must be"),
    ],
)
def test_what_cannot_be_meant_is_one_line(known, argument, line):
    with pytest.raises(UserError) as error:
        ready([argument], known)
    assert line in str(error.value) and len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_what_a_sweep_varies(known):
    assert ready([], known) == []
    given = ready(
        ["steps=1,2", "inner.rate=range(0,1,0.5)", "inner.path=a b,c", "prompt='x,y'", "many=1,[2,3]", "flag=true"],
        known,
        sweep=True,
    )
    assert given == [
        "steps=1,2",
        "inner.rate=range(0,1,0.5)",
        "inner.path='a b','c'",
        "prompt='x,y'",
        "many=[1],[2,3]",
        "flag=true",
    ]
    assert swept(given) == {"steps", "inner.rate", "inner.path", "many"}
    assert ready(["prompt=choice(a,b)"], known) == ["prompt='choice(a,b)'"]
