"""launch.train certificate=PATH on one rank: what is held to, what is refused, with which line. On two:
test_ranks.py."""

import json
import shutil

import pytest

from foreroute.engine.testing.ranks import change_certificate


def options(tmp_path, text, *more):
    return [
        "experiment=debug",
        "corpus=file",
        f"corpus.path={text}",
        f"corpus.cache_dir={tmp_path / 'cache'}",
        f"train.runs_dir={tmp_path / 'runs'}",
        "train.steps=6",
        "train.log_every=1",
        *more,
    ]


@pytest.fixture
def certificate(run, tmp_path, text):
    """The folder of a certificate of one rank."""
    folder = tmp_path / "found"
    done = run("certify", *options(tmp_path, text), f"out={folder}")
    size = (folder / "certificate.safetensors").stat().st_size
    assert done.returncode == 0 and f"certificate.safetensors ({size:,} bytes)" in done.stdout
    return folder


def test_a_run_is_held_to_its_certificate(run, tmp_path, text, certificate):
    """Options that change no count may differ; the first step that differs ends the run, and it can be resumed with
    another."""
    right = shutil.copytree(certificate, tmp_path / "right")
    rows = change_certificate(certificate, "computed_uyrm", (4, 1, 0, 0))
    free = (
        "optim.lr=0.001",
        "train.save_every=2",
        "train.name=held",
        "moe.expert_width=8",
        "moe.spread=1",
        "parallel.wire=bf16",
    )
    run_options = options(tmp_path, text, *free)
    done = run("train", *run_options, f"certificate={certificate}")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("foreroute: ")]
    kept = tmp_path / "runs/held/checkpoints/step-00000004"
    assert lines == [
        "foreroute: rank 0 differs from its certificate at step 5, layer 1, micro-batch 0: expert rows computed"
        f" {rows}, certified {rows + 1}; the last good checkpoint is {kept}"
    ]
    log = tmp_path / "runs/held/metrics.jsonl"
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 4
    done = run("train", *run_options, "train.resume=true", f"certificate={right / 'certificate.json'}")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4" in done.stdout and "\n2 steps were as certified\n" in done.stdout
    assert f"held to {right / 'certificate.json'}: all 6 steps" in done.stdout


REFUSED = {
    "another schedule": (["schedule.k_max=3"], "schedule.k_max=3, certified 4"),
    "another seed": (["train.seed=7"], "a run with other tables: train.seed=7, certified 1111; their"),
    "another length": (["train.steps=5"], "train.steps=5, certified 6"),
    "micro-batches": (["train.accumulation=2"], "train.accumulation=2, certified 1"),
    "a live router": (["moe.router=frozen"], "moe.router=frozen, certified hashed"),
    "another layout": (["data.streams=2"], "data.streams=2, certified 4"),
}


@pytest.mark.parametrize(("more", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_certificate_of_another_run_is_refused(run, tmp_path, text, certificate, more, words):
    done = run("train", *options(tmp_path, text, *more), f"certificate={certificate}")
    refused(done, tmp_path, words)


def refused(done, tmp_path, words):
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("foreroute: ")
    assert not list(tmp_path.glob("runs/*/config.yaml"))


def test_a_certificate_of_another_text_is_refused(run, tmp_path, text, certificate):
    text.write_bytes(text.read_bytes().replace(b"lazy", b"keen", 1))
    done = run("train", *options(tmp_path, text), f"certificate={certificate}")
    refused(done, tmp_path, "the corpus has changed since")


def test_a_certificate_of_other_ranks_is_refused(run, tmp_path, text):
    path = tmp_path / "found/certificate.json"
    assert run("certify", *options(tmp_path, text), "world_size=2", f"out={path.parent}").returncode == 0
    done = run("train", *options(tmp_path, text), f"certificate={path}")
    refused(done, tmp_path, f"ranks: 1; {path} is the certificate of a run on 2")


def test_what_is_no_certificate_is_refused(run, tmp_path, text, certificate):
    def start(path):
        return run("train", *options(tmp_path, text), f"certificate={path}")

    refused(start(tmp_path / "none"), tmp_path, f"certificate={tmp_path / 'none'}: no such file")
    refused(start(tmp_path), tmp_path, f"certificate={tmp_path / 'certificate.json'}: no such file")
    refused(start(text), tmp_path, f"{text}: not a certificate")
    arrays, facts = certificate / "certificate.safetensors", certificate / "certificate.json"
    content = arrays.read_bytes()
    arrays.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(start(certificate), tmp_path, f"{arrays}: damaged")
    arrays.unlink()
    refused(start(certificate), tmp_path, f"{arrays}: no such file")
    arrays.write_bytes(content)
    facts.write_text(facts.read_text().replace('"k_max": 4', '"k_max": 3'))
    refused(start(certificate), tmp_path, f"{facts}: its checksum does not match")
    facts.write_text("{}")
    refused(start(certificate), tmp_path, f"{facts}: not a certificate")
