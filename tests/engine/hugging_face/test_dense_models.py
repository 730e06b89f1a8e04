"""Dense models of transformers whose feed-forwards became experts: their outputs, family by family; random weights."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.transformers

from benchmarks.bench_convert.families import (  # noqa: E402
    EXPERTS,
    FAMILIES,
    convert,
    difference,
    differences,
    padded_batch,
    random_model,
)
from foreroute.engine.convert import Slices  # noqa: E402
from foreroute.engine.errors import UserError  # noqa: E402
from foreroute.engine.hugging_face.dense_models import convert_model, export_dense  # noqa: E402


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_theirs(name, tmp_path):
    """Copies at every k, slices with all, adapters; one slice differs, which shows that there are some."""
    dense, batch = random_model(name), padded_batch()
    found = differences(dense, batch)
    assert max(found.copies, found.slices) < 1e-5 and found.adapters == 0.0 and found.round_trip == 0.0
    model = copy.deepcopy(dense)
    experts = convert(model, Slices(), k=1)
    assert len(experts.layers) == 2 and difference(model, dense, batch) > 1e-3
    with torch.no_grad():
        for layer in experts.layers:
            layer.experts.w1.add_(0.01)
    experts.k = EXPERTS
    export_dense(model, tmp_path)
    trained = type(dense).from_pretrained(tmp_path).eval()
    assert difference(model, trained, batch) < 1e-5 < difference(model, dense, batch)
    assert {name for name, _ in trained.named_modules()} == {name for name, _ in dense.named_modules()}


def test_other_models_are_refused():
    config = transformers.OPTConfig(num_hidden_layers=1, hidden_size=8, ffn_dim=8, num_attention_heads=1, vocab_size=9)
    with pytest.raises(UserError, match=r"model_type=opt: must be one of gpt2, llama, .*; others take"):
        convert_model(transformers.OPTModel(config), Slices(), moe=None, k=1)
