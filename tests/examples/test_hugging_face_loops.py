"""The examples of Trainer and Accelerate on 1 and 2 ranks."""

import pytest

from tests.examples.programs import run_program

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.transformers]


def run(name, ranks, *arguments):
    """The losses of a run that never stopped, and of one that was resumed."""
    printed = run_program(f"examples.hugging_face.{name}", ranks, *arguments)
    lines = [line.partition(":") for line in printed.splitlines()]
    found = {head: text.split() for head, _, text in lines if head in ("never stopped", "resumed", "equal")}
    assert found["equal"] == ["True"]
    whole, resumed = ([float(number) for number in found[key]] for key in ("never stopped", "resumed"))
    assert resumed == whole[-len(resumed) :] and len(set(whole)) == len(whole)
    return whole


@pytest.mark.parametrize(("ranks", "arguments"), [(1, []), (1, ["--zero", "2"]), (2, []), (2, ["--zero", "3"])])
def test_accelerate_goes_on_bit_for_bit(ranks, arguments):
    losses = run("accelerate_loop", ranks, *arguments)
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.4


def test_trainer_goes_on_bit_for_bit_and_ranks_train_like_one():
    """Unequal lengths, accumulation, clipping, decay and evaluation; without dropout, which differs in the host."""
    steps = [0, 1, 2, 3, 5, 6, 7, 8]  # others are of evaluation, the mean of each batch's mean
    want = run("trainer", 1, "--dropout", "0")
    for stage in "0123":
        got = run("trainer", 2, "--dropout", "0", "--zero", stage)
        assert [got[step] for step in steps] == pytest.approx([want[step] for step in steps], rel=2e-6)
    assert want[8] < want[0] - 0.4


@pytest.mark.parametrize("ranks", [1, 2])
def test_trainer_with_dropout_and_a_worker(ranks):
    assert len(run("trainer", ranks, "--workers", "1")) == 10
