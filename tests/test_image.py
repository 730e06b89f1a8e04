"""The image is built for real, without a daemon: a base made here, and the Dockerfile through its arguments.

What pip installs is downloaded before, as this machine's pip finds it, and given to the build as an index in a folder.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
OS_RELEASE = Path("/etc/os-release")


def why_not():
    """Return what this machine lacks."""
    missing = [program for program in ("buildah", "mmdebstrap") if shutil.which(program) is None]
    if missing:
        return f"there is no {' and no '.join(missing)} here: `make test-cluster` installs them, as root"
    theirs = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True, check=False).stdout.split()
    if not theirs or not theirs[-1].startswith(f"{PYTHON}."):
        return f"the distribution's Python must be {PYTHON} as here, for packages are downloaded for it: {theirs}"
    return None


REASON = why_not()


def call(*words, **options):
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, timeout=1500, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def download(folder):
    """Fill an index of packages: folder/NAME/index.html."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["mpi"]
    pip = re.search(r"PIP_VERSION=(\S+)", (ROOT / "Dockerfile").read_text())[1]
    build = [*project["build-system"]["requires"], "wheel", f"pip=={pip}"]
    files = folder / "files"
    call(sys.executable, "-m", "pip", "download", "-q", "-c", ROOT / "constraints.txt", "-d", files, *needed, *build)
    for file in files.iterdir():
        name = re.sub(r"[-_.]+", "-", re.split(r"-\d", file.name)[0]).lower()
        page = folder / name / "index.html"
        page.parent.mkdir(exist_ok=True)
        with page.open("a") as index:
            index.write(f'<a href="../files/{file.name}">{file.name}</a><br>\n')


@pytest.mark.cluster
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_the_image_is_built_and_trains(tmp_path):
    (codename,) = re.findall(r"^VERSION_CODENAME=(\w+)$", OS_RELEASE.read_text(), re.MULTILINE)
    call("mmdebstrap", "--quiet", "--variant=minbase", codename, tmp_path / "base.tar")
    packages = tmp_path / "packages"
    download(packages)
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = file:///packages\n")
    checkout = tmp_path / "checkout"
    call("git", "clone", "--quiet", ROOT, checkout)
    buildah = ["buildah", "--root", tmp_path / "store", "--runroot", tmp_path / "run", "--storage-driver", "vfs"]
    try:
        base = call(*buildah, "from", "scratch").strip()
        call(*buildah, "add", "--quiet", base, tmp_path / "base.tar", "/")
        call(*buildah, "commit", "--quiet", "--rm", base, "localhost/base")
        arguments = {"BASE": "localhost/base", "PYTHON": PYTHON, "TORCH_INDEX": "file:///packages"}
        mounts = [f"--volume={packages}:/packages:ro", f"--volume={tmp_path}/pip.conf:/etc/pip.conf:ro"]
        given = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        call(*buildah, "build", "--isolation=chroot", "--format=docker", *mounts, *given, "--tag=foreroute", checkout)
        image = call(*buildah, "from", "foreroute").strip()
        said = call(*buildah, "run", "--isolation=chroot", image, "--", "launch/recipes/image_smoke.sh")
        assert f"python {PYTHON}" in said and "as user 10001" in said
        assert said.splitlines()[-1] == "this machine can train"
    finally:
        subprocess.run([*map(str, buildah), "rm", "--all"], capture_output=True, check=False)
