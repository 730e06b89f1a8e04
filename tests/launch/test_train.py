"""The way from the command line to a step."""

import json
import subprocess
import sys
from pathlib import Path

from foreroute.launch.testing.runs import small_run

ROOT = Path(__file__).resolve().parents[2]
MOST_FRAMES = 7
"""Frames of our own from the program to train_step, both counted."""

PROGRAM = """
import json, runpy, sys
from pathlib import Path
from foreroute.engine.train import step

root, rate = Path(sys.argv.pop(1)), step.learning_rate

def rate_and_frames(*arguments):  # called by train_step
    frame, own = sys._getframe(1), []
    while frame is not None:
        file = Path(frame.f_code.co_filename).resolve()
        if file.is_file() and file.is_relative_to(root) and ".venv" not in file.parts:
            own.append(f"{file.relative_to(root)} {frame.f_code.co_name}")
        frame = frame.f_back
    print("frames:", json.dumps(own[::-1]), flush=True)
    return rate(*arguments)

step.learning_rate = rate_and_frames
runpy.run_module("launch.train", run_name="__main__", alter_sys=True)
"""


def test_few_frames_lie_between_the_program_and_a_step(tmp_path):
    options = [*small_run(tmp_path), f"train.runs_dir={tmp_path}", "train.steps=1"]
    command = [sys.executable, "-c", PROGRAM, str(ROOT), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("frames: ")]
    frames = json.loads(line.removeprefix("frames: "))
    assert frames[0] == "launch/train.py <module>" and frames[-1] == "engine/train/step.py train_step"
    assert len(frames) <= MOST_FRAMES, frames
