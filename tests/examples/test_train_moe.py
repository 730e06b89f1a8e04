"""The example of expert models of transformers."""

import pytest

from tests.examples.programs import run_program

pytest.importorskip("transformers")
pytestmark = pytest.mark.transformers


def run(ranks, *arguments):
    """The lines of a run, as columns."""
    printed = run_program("examples/hugging_face/train_moe.py", ranks, *arguments)
    return [line.split() for line in printed.splitlines() if line.endswith(("yes", "no"))]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "arguments", "sent"),
    [
        (1, ["--families", "Qwen3Moe"], {"live": "0", "replayed": "0"}),
        pytest.param(2, ["--stage", "3"], {"live": "4", "replayed": "2"}, marks=pytest.mark.slow),
    ],
)
def test_logits_are_theirs_and_training_learns(ranks, arguments, sent):
    """A live router's counts and weights are two collectives of a layer more."""
    lines = run(ranks, *arguments)
    assert len(lines) == (2 if ranks == 1 else 6)
    for _, routes, error, collectives, bytes_sent, first, last, same in lines:
        assert float(error) < 1e-5 and collectives == sent[routes] and same == "yes"
        assert float(last) < float(first.rstrip(",")) - 1
        assert (bytes_sent != "0") == (ranks > 1)
