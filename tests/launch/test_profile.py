"""profile.steps as a user meets it: what is said and written, that a resumed run may change it, and what is refused."""

from foreroute.launch.testing.runs import small_run


def test_a_profiled_run(run, tmp_path):
    options = [*small_run(tmp_path), f"train.runs_dir={tmp_path}", "train.steps=4"]
    refused = run("train", *options, "profile.steps=[3,2]")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        "foreroute: profile.steps=[3, 2]: must be the first and the last step, such as [5,8], counted from 1"
    ]
    done = run("train", *options, "profile.steps=[2,3]")
    assert done.returncode == 0, done.stderr
    assert "steps 2 to 3: " in done.stdout and "forward/attention" in done.stdout
    assert done.stderr == ""
    files = sorted(path.name for path in (tmp_path / "debug/trace").iterdir())
    assert files == ["step2-3.rank0.json.gz", "step2-3.txt"]
    assert (tmp_path / "debug/trace/step2-3.txt").read_text() in done.stdout
    again = run("train", *options, "train.resume=true", "profile.steps=[1,1]")
    assert again.returncode == 0 and "is complete" in again.stdout
