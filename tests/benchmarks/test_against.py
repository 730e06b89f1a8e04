"""Two trees in one run: what differs is told, what is equal is equal, and no worktree is left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.against import HERE, Failed, compare, print_comparison

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = """import json, sys, product
print("a table")
print(json.dumps({"ms": {"step": product.MS, "none": None}, "losses": product.LOSSES, "argument": sys.argv[1]}))
"""


def git(folder, *arguments):
    return subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x", *arguments],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.fixture
def repository(tmp_path):
    """Its first commit has no benchmark and takes 4 ms; the second 2 ms with other losses; the working tree 2 ms."""
    root = tmp_path / "repository"
    (root / "benchmarks").mkdir(parents=True)
    git(root, "init", "--quiet")
    for tag, text in {
        "slow": "MS, LOSSES = 4, 'a'",
        "other": "MS, LOSSES = 2, 'b'",
        "now": "MS, LOSSES = 2, 'a'",
    }.items():
        (root / "product.py").write_text(text + "\n")
        if tag != "now":
            git(root, "add", "product.py")
            git(root, "commit", "--quiet", "-m", tag)
            git(root, "tag", tag)
    (root / "benchmarks/bench_fake.py").write_text(BENCHMARK)
    return root


def compared(repository, rev, capsys):
    found = compare(repository, rev, ["benchmarks.bench_fake", "x"], rounds=2)
    assert len(found[HERE]) == len(found[rev]) == 2
    print_comparison(found, rev)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def worktrees(repository):
    return git(repository, "worktree", "list").splitlines()


def test_the_product_of_each_tree_is_measured_by_this_trees_benchmark(repository, capsys):
    found = compared(repository, "slow", capsys)
    assert found["minima"] == {HERE: {"ms.step": 2}, "slow": {"ms.step": 4}}
    assert found["ratio"] == {"ms.step": 0.5}
    assert found["same"] == {"losses": True, "argument": True}
    assert len(worktrees(repository)) == 1


def test_texts_that_differ_are_told(repository, capsys):
    found = compared(repository, "other", capsys)
    assert found["ratio"] == {"ms.step": 1.0}
    assert found["same"] == {"losses": False, "argument": True}


def test_minima_are_over_all_rounds(capsys):
    print_comparison({HERE: [{"ms": 5.0}, {"ms": 3.0}], "old": [{"ms": 2.0}, {"ms": 6.0}]}, "old")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ratio"] == {"ms": 1.5}


@pytest.mark.parametrize("text", ["import nothing_of_this_name", "print('no JSON')", "print(3)", ""])
def test_a_benchmark_that_fails_is_named_and_no_worktree_is_left(repository, text):
    (repository / "benchmarks/bench_fake.py").write_text(text)
    with pytest.raises(Failed, match=r"bench_fake on (this tree|slow)"):
        compare(repository, "slow", ["benchmarks.bench_fake"], rounds=1)
    assert len(worktrees(repository)) == 1


@pytest.mark.parametrize("rev", ["nope", "--help", "", "slow:product.py"])
def test_what_is_no_revision_is_refused(repository, rev):
    with pytest.raises(ValueError, match="no such revision"):
        compare(repository, rev, ["benchmarks.bench_fake"], rounds=1)
    assert len(worktrees(repository)) == 1


@pytest.mark.slow
def test_a_benchmarks_own_option_ends_with_one_line_and_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_plan", "--against", "nope", "--rounds", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--against nope: no such revision" in done.stderr.splitlines()[-1]
