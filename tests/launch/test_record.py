"""launch.record writes the routes of a run, and a run with these routes evaluates like it."""

import json

import numpy as np
import pytest

from foreroute.engine.routing.planned.given import NONE

OPTIONS = ["train.steps=3", "train.threads=1", "eval.max_symbols=200", "eval.k=[1,2]", "schedule.k_max=2"]


@pytest.fixture
def options(tmp_path, text):
    """Of a run of three steps on a short text."""
    text.write_bytes(np.random.default_rng(0).integers(97, 110, 9000).astype(np.uint8).tobytes())
    folders = [f"corpus.path={text}", f"corpus.cache_dir={tmp_path / 'cache'}", f"train.runs_dir={tmp_path}"]
    return ["experiment=debug", "corpus=file", *folders, *OPTIONS]


def done(run, *arguments):
    found = run(*arguments)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_a_learned_run_is_recorded_and_replayed(run, tmp_path, options):
    done(run, "train", *options, "moe.router=learned", "train.name=learned")
    folder, files = tmp_path / "learned", {}
    for split in ("train", "valid", "test"):
        files[split] = tmp_path / f"{split}.npy"
        output = done(run, "record", f"run={folder}", f"split={split}", f"out={files[split]}")
        assert f"written: {files[split]}, routes of" in output
    evaluated = done(run, "evaluate", f"run={folder}", "k=[2]", "split=test", "max_symbols=0").splitlines()[-1]
    assert f"{json.loads(evaluated)['bpc']['2']:.4f} bits per symbol" in output
    experts, weights = np.load(files["test"]), np.load(tmp_path / "test.weights.npy")
    assert experts.shape == weights.shape and experts.shape[2] == 2 and not (experts == NONE).any()
    np.testing.assert_allclose(weights.sum(axis=2), 1, rtol=1e-6)

    given = [f"moe.options.{'' if split == 'train' else f'{split}_'}file={files[split]}" for split in files]
    done(run, "train", *options, "moe.router=given", *given, "train.name=given", "train.valid_every=2")
    lacks = run("train", *options, "moe.router=given", given[0], "train.name=lacks")
    assert lacks.returncode == 2 and lacks.stderr.count("\n") == 1
    assert "moe.options.test_file is missing" in lacks.stderr
    many = run("train", *options, "moe.router=given", *given, "train.name=many", "eval.k=[4]")
    assert many.returncode == 2 and "has 2 experts of a token, k must be at most 2" in many.stderr


def test_only_live_routes_are_recorded(run, tmp_path, options):
    done(run, "train", *options, "train.name=hashed")
    found = run("record", f"run={tmp_path / 'hashed'}", f"out={tmp_path / 'routes.npy'}")
    assert found.returncode == 2 and "moe.router=hashed: only a live router" in found.stderr
    assert not (tmp_path / "routes.json").exists()
