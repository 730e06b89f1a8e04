"""The mutants' own machinery, on a package of one file: what is noticed, what survives, what is left out."""

import hashlib
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest

from benchmarks.mutants.equivalent import Equivalent, read_list
from benchmarks.mutants.places import places
from benchmarks.mutants.pool import Worker
from benchmarks.mutants.rooms import ROOMS, draw, files_of
from benchmarks.mutants.trial import Trial

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''"""Numbers in strings are left alone: 3 + 4."""
LIMIT = 5  # import


def capped(x: int) -> int:
    """Cap x."""
    if x < 0:
        raise ValueError(1 + 2)
    return min(x, LIMIT)


def sign(x: int) -> int:
    return -1 if x < 0 else 1


def unseen(x: int) -> int:
    return x * 3
'''
TESTS = """
from room.numbers import capped, sign

def test_cap():
    assert capped(3) == 3 and capped(9) == 5

def test_sign():
    assert sign(-7) == -1 and sign(7) == 1
"""


def changes(source):
    """Each place as its token and what it becomes."""
    return [(place.old, place.changes) for place in places(dedent(source))]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("y = x[1:]", [("1", ("2", "0"))]),
        ("y = -1", [("-1", ("0", "-2"))]),
        ("y = (a *\n b)", [("*", ("/", "+"))]),
        ("y = (a) * (b)", [("*", ("/", "+"))]),
        ("a <= b not in c", [("<=", ("<", ">")), ("not in", ("in",))]),
        ("x += 2.5", [("+=", ("-=",)), ("2.5", ("5.0",))]),
        ("not a and b", [("not", ("",)), ("and", ("or",))]),
        ("f(max(a), flag=True)", [("max", ("min",)), ("True", ("False",))]),
        ("def f(x: int | None = 0) -> A | B: pass", [("0", ("1",))]),
        ("zip(a, b, strict=True)", []),
        ("@dataclass(frozen=True)\nclass A: pass", []),
        ("raise ValueError(1)", []),
        ("log.info(1 + 2, f'{1 + 2}')", []),
        ("assert a == b, 1", [("==", ("!=",))]),
    ],
)
def test_places(source, found):
    assert changes(source) == found


def test_one_token_is_replaced():
    source = "x = 1  # one\ny = (x +\n     2)\n"
    plus = places(source)[1]
    assert plus.apply(source, "-") == "x = 1  # one\ny = (x -\n     2)\n"
    assert (plus.line, plus.statement) == (2, (2, 3))


def test_every_mutant_of_the_rooms_compiles():
    for mutant in draw(ROOT, ROOMS, seed=0)[::20]:
        source = (ROOT / mutant.file).read_text()
        changed = mutant.place.apply(source, mutant.new)
        assert changed != source
        compile(changed, mutant.file, "exec")


def test_a_draw_takes_the_rooms_in_turn_and_repeats():
    first, again, other = (draw(ROOT, ROOMS, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [mutant.room for mutant in first[: 2 * len(ROOMS)]] == [*ROOMS, *ROOMS]


def test_every_room_has_files_and_every_equivalent_its_line():
    files = files_of(ROOT, ROOMS)
    assert set(files.values()) == set(ROOMS)
    for entry in read_list():
        lines = [line.strip() for line in (ROOT / entry.file).read_text().splitlines()]
        assert entry.file in files and entry.line in lines and entry.reason, entry


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("mutants")
    for name, text in {
        "room/__init__.py": "",
        "room/numbers.py": SOURCE,
        "tests/room/test_numbers.py": TESTS,
        "pyproject.toml": '[tool.pytest.ini_options]\nmarkers = ["slow", "gpu", "cluster"]\n',
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.slow
def test_what_is_noticed_survives_and_is_left_out(tree, tmp_path):
    before = hashlib.sha256((tree / "room/numbers.py").read_bytes()).hexdigest()
    same = Equivalent("room/numbers.py", "return -1 if x < 0 else 1", "<", "x is never 0", new="<=")
    again = replace(same, new=">=")
    worker = Worker(tree, tmp_path, [])
    try:
        trial = Trial(tree, tmp_path / "kept", [worker], {"numbers": ("room/*.py",)}, [same, again])
        verdicts, left_out = trial.run(100, seed=3)
    finally:
        worker.close()
    fate = {(v.mutant.place.line, v.mutant.place.old): v for v in verdicts}
    assert len(left_out) == 1 and (13, "<") not in fate
    assert fate[9, "min"].noticed and "test_cap" in fate[9, "min"].by
    assert fate[2, "5"].noticed and fate[13, "-1"].noticed
    assert not fate[17, "*"].noticed and fate[17, "*"].by == "no test runs it"
    assert hashlib.sha256((tree / "room/numbers.py").read_bytes()).hexdigest() == before
