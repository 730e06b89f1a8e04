"""Entries of n-gram vectors against plain loops in fp64, cut segments against whole texts, and transformers' layer."""

from types import SimpleNamespace

import pytest
import torch

from foreroute.engine.ngram_tables.entries import ENGRAM, PER_LAYER, Added, Gated, GateForm, IntoValues
from foreroute.kernels.testing import cases
from tests.references.ngram_entries import gated

STREAMS, HEADS, WIDTH = 2, 2, 3
D = 4
FORMS = {"engram": ENGRAM, "per_layer": PER_LAYER}


def relative_error(got, want):
    return cases.relative_error(got.detach(), want.detach())


def make(form=ENGRAM, *, dilation=3, seed=0):
    """A gate whose parameters are all drawn."""
    torch.manual_seed(seed)
    entry = Gated(HEADS * WIDTH, D, dilation=dilation, form=form).double()
    for parameter in entry.parameters():
        torch.nn.init.normal_(parameter, 0.3, 0.7)
    return entry


def inputs(length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    draw = [
        torch.randn(STREAMS, length, *size, dtype=torch.float64, generator=generator) for size in ((HEADS, WIDTH), (D,))
    ]
    return [tensor.requires_grad_() for tensor in draw]


def by_segments(entry, row_BQHW, x_BQD, lengths, *, memory=0, position_BQ=None):
    """Outputs of a text in segments, with what the entry keeps; and the values of each segment's positions."""
    kept, outputs, values, first = None, [], [], 0
    for length in lengths:
        here = slice(first, first + length)
        positions = None if position_BQ is None else position_BQ[:, here]
        output = entry(row_BQHW[:, here], x_BQD[:, here], kept, memory=memory, position_BQ=positions)
        outputs.append(output.x_BQD)
        if output.value_BSI is not None:
            assert output.value_BSI.shape[1] == (0 if kept is None else kept.shape[1]) + length
            values.append(output.value_BSI)
        kept = output.kept
        assert kept is None or not kept.requires_grad
        first += length
    return torch.cat(outputs, dim=1), values


def loop(entry, form, row_BQHW, x_BQD, dilation, begins=(0,)):
    p = {
        "key": entry.key.weight,
        "key_bias": entry.key.bias,
        "value": entry.value.weight,
        "value_bias": entry.value.bias,
        "key_gain": entry.key_norm.weight,
        "x_gain": entry.x_norm.weight,
        "convolution_gain": entry.convolution_norm.weight,
        "convolution": entry.convolution,
    }
    eps = torch.finfo(torch.float64).eps if form.eps is None else form.eps
    settings = {"dilation": dilation, "eps": eps, "convolution_eps": form.convolution_eps, "begins": begins}
    pairs = zip(row_BQHW.flatten(2), x_BQD, strict=True)
    return torch.stack([gated(row_QX, x_QD, p, **settings) for row_QX, x_QD in pairs])


def gradients(y, cotangent, entry, *tensors):
    return torch.autograd.grad(y, [*tensors, *entry.parameters()], cotangent, materialize_grads=True)


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_gate_equals_plain_loops(form, dilation):
    """Forward and every gradient; and another form is another result."""
    entry, (row_BQHW, x_BQD) = make(form, dilation=dilation), inputs(12)
    cotangent = torch.randn(x_BQD.shape, dtype=torch.float64)
    y = entry(row_BQHW, x_BQD, None, memory=0).x_BQD
    want = loop(entry, form, row_BQHW, x_BQD, dilation)
    assert relative_error(y, want) < 1e-13
    got = gradients(y, cotangent, entry, row_BQHW, x_BQD)
    expected = gradients(want, cotangent, entry, row_BQHW, x_BQD)
    assert max(map(relative_error, got, expected)) < 1e-12
    assert all(gradient.abs().max() > 0 for gradient in got)
    looser = GateForm(form.bias, 0.1, form.convolution_eps)
    assert relative_error(y, loop(entry, looser, row_BQHW, x_BQD, dilation)) > 1e-3
    assert relative_error(y, loop(entry, form, row_BQHW, x_BQD, dilation + 1)) > 1e-3


def test_a_small_product_still_opens_half():
    """The gate's root is cut at 1e-6: without rows it is 1/2, and its gradient there is zero, not infinite."""
    entry, (row_BQHW, x_BQD) = make(PER_LAYER), inputs(4)
    zero = torch.zeros_like(row_BQHW, requires_grad=True)
    y = entry(zero, x_BQD, None, memory=0).x_BQD
    assert torch.equal(y, x_BQD)
    (gradient,) = torch.autograd.grad(y.sum(), zero)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("lengths", [(9, 11), (1,) * 20, (2, 17, 1), (20,)], ids=str)
def test_a_cut_changes_nothing(lengths):
    entry, (row_BQHW, x_BQD) = make(), inputs(20)
    whole, _ = by_segments(entry, row_BQHW, x_BQD, (20,))
    assert relative_error(by_segments(entry, row_BQHW, x_BQD, lengths)[0], whole) < 1e-14


def test_without_what_it_keeps_a_cut_shows():
    entry, (row_BQHW, x_BQD) = make(), inputs(20)
    whole, _ = by_segments(entry, row_BQHW, x_BQD, (20,))
    parts = [by_segments(entry, row_BQHW[:, here], x_BQD[:, here], (10,))[0] for here in (slice(0, 10), slice(10, 20))]
    assert relative_error(torch.cat(parts, dim=1), whole) > 1e-3


@pytest.mark.parametrize("lengths", [(20,), (7, 13), (1,) * 20], ids=str)
def test_documents_do_not_see_each_other(lengths):
    """With positions in documents the convolution stops at their starts, wherever segments are cut."""
    entry, (row_BQHW, x_BQD) = make(), inputs(20)
    begins = [0, 4, 5, 12]
    position_Q = torch.tensor([place - max(b for b in begins if b <= place) for place in range(20)])
    got, _ = by_segments(entry, row_BQHW, x_BQD, lengths, position_BQ=position_Q.expand(STREAMS, -1))
    assert relative_error(got, loop(entry, ENGRAM, row_BQHW, x_BQD, 3, begins)) < 1e-13
    assert relative_error(got, loop(entry, ENGRAM, row_BQHW, x_BQD, 3)) > 1e-3


def test_the_convolution_is_zero_at_first():
    entry, (row_BQHW, x_BQD) = make(), inputs(8)
    fresh = Gated(HEADS * WIDTH, D, dilation=3).double()
    assert fresh.convolution.count_nonzero() == 0
    with torch.no_grad():
        entry.convolution.zero_()
    y, _ = by_segments(entry, row_BQHW, x_BQD, (8,))
    alone = torch.cat([by_segments(entry, row_BQHW[:, i : i + 1], x_BQD[:, i : i + 1], (1,))[0] for i in range(8)], 1)
    assert relative_error(y, alone) < 1e-14


def test_the_layer_of_transformers():
    """One stream of hidden states; theirs stores gains less 1, and returns what is added."""
    module = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp")
    own = {"ple_embed_dim": HEADS * WIDTH, "ple_conv_kernel_size": 4, "ngram_size": 3, "heads_per_ngram": 3}
    tables = {"ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 1, "vocab_size": 9, "seed": 1234}
    config = SimpleNamespace(**own, **tables, hidden_size=D, hc_count=1, rms_norm_eps=1e-6, eos_token_id=0)
    theirs = module.Qwen4ExpTextPLELayer(config, 0, 0).double()
    entry, (row_BQHW, x_BQD) = make(PER_LAYER), inputs(13)
    with torch.no_grad():
        theirs.key_proj.weight.copy_(entry.key.weight)
        theirs.value_proj.weight.copy_(entry.value.weight)
        theirs.norm_key.weight.copy_(entry.key_norm.weight - 1)
        theirs.norm_query.weight.copy_(entry.x_norm.weight - 1)
        theirs.norm_conv.weight.copy_(entry.convolution_norm.weight - 1)
        theirs.conv1d.weight.copy_(entry.convolution[:, None])
    theirs.ple_embedding.forward = lambda *_: row_BQHW.flatten(2)
    added = theirs(x_BQD, None, None)
    y, _ = by_segments(entry, row_BQHW, x_BQD, (5, 8))
    assert relative_error(y - x_BQD, added) < 1e-5  # their norms are computed in fp32


@pytest.mark.parametrize("width", [HEADS * WIDTH, 5])
def test_added(width):
    torch.manual_seed(0)
    entry, (row_BQHW, _) = Added(HEADS * WIDTH, width).double(), inputs(7)
    x_BQD = torch.randn(STREAMS, 7, width, dtype=torch.float64)
    y, _ = by_segments(entry, row_BQHW, x_BQD, (7,))
    for b in range(STREAMS):
        for q in range(7):
            e_X = torch.cat(list(row_BQHW[b, q]))
            added_D = e_X if width == HEADS * WIDTH else torch.stack([w_X @ e_X for w_X in entry.project.weight])
            assert relative_error(y[b, q], x_BQD[b, q] + added_D) < 1e-14


@pytest.mark.parametrize("memory", [0, 3, 50])
@pytest.mark.parametrize("inner", [HEADS * WIDTH, 5])
def test_values_of_memory_and_segment(inner, memory):
    """Each segment's values are those of the newest positions that attention sees, then its own."""
    torch.manual_seed(0)
    entry, (row_BQHW, x_BQD) = IntoValues(HEADS * WIDTH, inner).double(), inputs(12)
    y, values = by_segments(entry, row_BQHW, x_BQD, (5, 4, 3), memory=memory)
    assert torch.equal(y, x_BQD)
    all_BSI = entry.project(row_BQHW.flatten(2))
    for value_BSI, first, end in zip(values, (0, 5, 9), (5, 9, 12), strict=True):
        assert relative_error(value_BSI, all_BSI[:, max(0, first - memory) : end]) < 1e-14
