"""Whole training steps with the Triton backend equal those with the CPU backend: losses, parameters, kernels
launched."""

import pytest
import torch
from safetensors.torch import load_file

from foreroute.kernels.launching import recording
from foreroute.launch import train


@pytest.fixture(autouse=True)
def interpreted(watched):
    if watched is None:
        pytest.skip("training runs on the CPU so far: interpreted only")


def run(monkeypatch, tmp_path, backend, *more):
    """Return the final checkpoint's weights: experiment=debug on two streams, three steps unless `more` has others."""
    text = tmp_path / "text.txt"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 400)
    arguments = [
        "train",
        "experiment=debug",
        "corpus=file",
        f"corpus.path={text}",
        f"corpus.cache_dir={tmp_path / 'cache'}",
        f"train.runs_dir={tmp_path / 'runs'}",
        f"train.name={backend}",
        "train.steps=3",
        "data.streams=2",
        "data.segment=16",
        "eval.k=[2]",
        "eval.max_symbols=64",
        "eval.streams=2",
        "kernels.masked_from_k=5",
        f"kernels.backend={backend}",
        *more,
    ]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 0
    tensors = {}
    for path in sorted((tmp_path / "runs" / backend / "checkpoints").rglob("*.safetensors")):
        tensors |= load_file(path)
    return {name: value for name, value in tensors.items() if value.is_floating_point()}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="hashed"),
        pytest.param(
            # two steps: the second one trains with weights that the first one's gradients have moved
            (
                *("moe.router=learned", "moe.activation=geglu", "moe.shared_width=8", "moe.expert_width=20"),
                *("train.steps=2", "data.segment=8", "model.memory=8", "model.width=16", "model.head_width=8"),
            ),
            id="learned",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_training_equals_the_cpu_backend(monkeypatch, tmp_path, more):
    want = run(monkeypatch, tmp_path, "cpu", *more)
    with recording() as recorder:
        got = run(monkeypatch, tmp_path, "triton", *more)
    assert len(want) > 20 and got.keys() == want.keys()
    for name, value in want.items():
        # Adam turns rounding noise of near-zero gradients into whole steps: see the numerics contract
        assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-5), name
    names = {launch.name for launch in recorder.launches}
    learned = {"_dweight_kernel"} if "moe.router=learned" in more else set()
    assert names == learned | {
        "_tile_map_kernel",
        "_up_kernel",
        "_down_kernel",
        "_down_backward_kernel",
        "_weights_kernel",
        "_combine_kernel",
    }
