"""One import root: a wheel and a source archive are complete, and other packages of our folders' names do no harm, nor
take any."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from foreroute.launch.testing.runs import small_run

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = "raise ImportError('somebody else')\n"
SHORT = "train.steps=2", "optim.warmup_steps=0", "eval.max_symbols=256"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what git has, without anything that was made."""
    folder = tmp_path_factory.mktemp("checkout")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    command = ["tar", "--create", "--null", "--files-from=-"]
    packed = subprocess.run(command, cwd=ROOT, input=files, capture_output=True, check=True).stdout
    subprocess.run(["tar", "--extract", "--directory", str(folder)], input=packed, check=True)
    return folder


@pytest.fixture(scope="module")
def made(checkout, tmp_path_factory):
    """What the wheel holds, made of what the source archive holds."""
    folder = tmp_path_factory.mktemp("made")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    subprocess.run(["tar", "--extract", "--file", archive, "--directory", folder], check=True)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(folder)!r}))"
    (source,) = (path for path in folder.iterdir() if path.is_dir())
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as found:
        found.extractall(folder / "site")
        return folder / "site", set(found.namelist())


def python(*arguments, cwd, path="", **more):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(path), **more}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environ, capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_a_wheel_is_the_whole_program(made, tmp_path):
    site, names = made
    ours = [
        path.relative_to(ROOT)
        for folder in ("engine", "kernels", "launch", "conf")
        for path in (ROOT / folder).rglob("*")
    ]
    want = {
        f"foreroute/{path}"
        for path in ours
        if path.suffix in (".py", ".yaml", ".js") and "__pycache__" not in path.parts
    }
    own = {"foreroute/conf/cluster/this_machine.yaml"}  # of benchmarks.calibrate; git ignores it
    assert want - own <= names and not any(name.startswith(("engine", "tests", "benchmarks")) for name in names)
    where = python("-c", "import foreroute; print(foreroute.__file__)", cwd=tmp_path, path=site)
    assert where.stdout.strip() == str(site / "foreroute/__init__.py"), where.stderr
    options = [*small_run(tmp_path), f"train.runs_dir={tmp_path}", *SHORT]
    done = python("-m", "foreroute.launch.train", *options, cwd=tmp_path, path=site)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "debug/summary.json").is_file()


@pytest.mark.slow
def test_what_lies_beside_us_does_no_harm(tmp_path):
    """Files of the user's with our folders' names; and the command works from any folder."""
    for name in ("engine.py", "launch.py", "conf.py"):
        (tmp_path / name).write_text(FOREIGN)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text(FOREIGN)
    done = python(
        "-m", "foreroute.launch.train", *small_run(tmp_path), f"train.runs_dir={tmp_path}", *SHORT, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    code = "import engine" if (tmp_path / "engine.py").exists() else ""
    assert "somebody else" in python("-c", code, cwd=tmp_path).stderr  # control


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(["-m", "launch.prepare", "--help"], marks=pytest.mark.slow),
        pytest.param(["-m", "benchmarks.bench_plan", "--help"], marks=pytest.mark.slow),
        ["-c", "import foreroute.launch"],
    ],
    ids=" ".join,
)
def test_our_folders_stand_for_no_other_package(tmp_path, start):
    """Started in the checkout, which Python then has on its path: `import kernels` gives who is installed."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("")
    say = (
        "import sys\nclass Say:\n    def find_spec(self, name, path=None, target=None):\n        if name =="
        " 'foreroute.launch':\n            import atexit; atexit.register(lambda:"
        " print(__import__('kernels').__file__))\nsys.meta_path.insert(0, Say())\n"
    )
    (tmp_path / "sitecustomize.py").write_text(say)
    done = python(*start, cwd=ROOT, path=tmp_path)
    assert done.stdout.splitlines()[-1] == str(tmp_path / "kernels/__init__.py"), done.stderr


def test_a_checkout_without_its_links(checkout, tmp_path):
    """As a zip unpacks where there are no links: files that hold their targets."""
    for name in ("engine", "kernels", "launch", "conf"):
        link = checkout / "foreroute" / name
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)
    try:
        done = python("-m", "launch.prepare", "--help", cwd=checkout, path=checkout)
        assert done.returncode == 0 and "corpus" in done.stdout, done.stderr
        code = "import foreroute.engine.config as c; print(c.__file__)"
        assert python("-c", code, cwd=tmp_path, path=checkout).stdout.strip() == str(
            checkout / "engine/config/__init__.py"
        )
    finally:
        for name in ("engine", "kernels", "launch", "conf"):
            (checkout / "foreroute" / name).unlink()
            (checkout / "foreroute" / name).symlink_to(f"../{name}")


BESIDE = '''
import sys
import torch
from torch import distributed as dist
from torch import multiprocessing


def check(rank=0):
    """A model of transformers, which uses the package kernels, with our expert layers."""
    import kernels
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import is_kernels_available

    import foreroute.launch
    from foreroute import MoEConfig, replace_feed_forwards

    assert is_kernels_available() and kernels.__file__.startswith(sys.argv[1]), kernels.__file__
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
    moe = MoEConfig(experts=4, expert_width=8, ngram=2, rows=64, builder="random")
    where = r"model[.]layers[.][0-9]+[.]mlp"
    experts = replace_feed_forwards(model, where, width=16, vocab_size=64, moe=moe, k=2, seed=0)
    ids = torch.arange(12).reshape(2, 6)
    with experts.planned(ids):
        model(input_ids=ids, labels=ids).loss.backward()
    assert experts.layers[0].experts.w1.grad.abs().sum() > 0
    sys.stdout.write("fine\\n")  # in one piece, also of two processes


def test_check():
    check()


if __name__ == "__main__":
    if "spawn" in sys.argv:
        multiprocessing.spawn(check, nprocs=2)
    else:
        check()
'''


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory):
    """Transformers, with the version of the package kernels that it uses."""
    folder = tmp_path_factory.mktemp("neighbours")
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", folder, "-c", ROOT / "constraints.txt"]
    done = subprocess.run([*install, "transformers[kernels]"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install transformers[kernels] here: {done.stderr.splitlines()[-1]}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [False, True], ids=["root", "elsewhere"])
@pytest.mark.parametrize(
    ("start", "behind", "times"),
    [
        ([], [], 1),
        ([], ["spawn"], 2),
        (["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"], [], 2),
        (["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"], [], 1),
    ],
    ids=["script", "spawn", "torchrun", "pytest"],
)
def test_beside_transformers_and_its_kernels(neighbours, tmp_path, start, behind, times, elsewhere):
    file = tmp_path / "test_beside.py"
    file.write_text(BESIDE)
    if start[:2] == ["-m", "pytest"]:  # its words are pytest's own, and it begins with conftest.py
        told = BESIDE.replace("sys.argv[1]", repr(str(neighbours)))
        file.write_text(f"import foreroute.launch\n{told}")
        words = [*start, file]
    else:
        words = [*start, file, neighbours, *behind]
    done = python(*map(str, words), cwd=tmp_path if elsewhere else ROOT, path=neighbours)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("fine\n") == times, done.stdout
