"""Cross-entropy of a linear output layer that never holds all logits: tokens in chunks, gradients in the forward pass.

    logit[t] = weight @ hidden[t] + bias;   nll[t] = logsumexp(logit[t]) - logit[t, target[t]]
    loss = scale * sum over t of nll[t]

The gradient of a sum of nats needs nothing that comes after it but a factor. So a chunk's logits become its softmax, in
place, and then its part of every gradient, before the next chunk has any; backward multiplies by the factor. Neither
hidden states nor weights are kept for it. Three products as in the plain way, and none is made twice.

PyTorch 2.13 and later can chunk in torch.nn.functional.linear_cross_entropy, which takes options for it. That is not
used here: with reduction="mean" it returns no nats of single tokens, and with "none" it computes the logits again in
backward.

Letters: T tokens, D width, V symbols.
"""

from collections.abc import Callable, Iterator
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST_CHUNK = 256
"""Tokens of a chunk, at least. A chunk has as many as the layer's width where that is more: its logits then take as
many numbers as the gradient of the weights."""


class CrossEntropy(NamedTuple):
    """Nats of targets."""

    loss: Tensor  # scalar: scale times their sum; fp32, or fp64 for fp64
    nll_T: Tensor  # of each target, without gradient; 0 where it does not count


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target_T: Tensor,
    *,
    scale: float,
    counted_N: Tensor | None = None,
    chunk: int | None = None,
) -> CrossEntropy:
    """Compute the cross-entropy of logits hidden @ weight.T + bias, chunk by chunk of tokens.

    Logits and the gradients of logits are rounded to the dtype of the hidden states, as in the plain way; softmax, nats
    and the sum of the weights' gradients over chunks are fp32 (fp64 for fp64). Backward works once.

    Args:
        hidden_TD: hidden states, any dtype with the same one for weights and bias.
        weight_VD: a row for each symbol.
        bias_V: a number for each symbol.
        target_T: int64, the symbol of each token.
        scale: factor of the loss, such as 1 / T for the mean.
        counted_N: int64, the tokens that count, each once; None means all. The others have no logits, 0 nats and zeros
            as gradients.
        chunk: tokens at once, at most; by default the larger of LEAST_CHUNK and D.

    Raises:
        ValueError: the shapes do not fit each other, or chunk < 1.

    Example: logits 0 and log 3 of one token, target 0. The softmax is 1/4 and 3/4, the nats are log 4, and the bias has
    the gradient (1/4 - 1, 3/4).

        >>> bias = torch.tensor([1.0, 3.0]).log().requires_grad_()
        >>> hidden, weight = torch.zeros(1, 2), torch.zeros(2, 2)
        >>> out = linear_cross_entropy(hidden, weight, bias, torch.tensor([0]), scale=1.0)
        >>> out.loss.backward()
        >>> round(out.loss.item(), 4), [round(x, 4) for x in bias.grad.tolist()]
        (1.3863, [-0.75, 0.75])
    """
    shapes = [tuple(x.shape) for x in (hidden_TD, weight_VD, bias_V, target_T)]
    if [len(shape) for shape in shapes] != [2, 2, 1, 1] or not (
        shapes[0][1] == shapes[1][1] and shapes[1][:1] == shapes[2] and shapes[0][:1] == shapes[3]
    ):
        raise ValueError(f"hidden, weight, bias and target of shapes {shapes} do not fit each other")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1")
    grads = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden_TD, weight_VD, bias_V))
    arguments = (hidden_TD, weight_VD, bias_V, target_T, scale, counted_N, chunk or largest_chunk(shapes[0][1]), grads)
    if torch.compiler.is_compiling():
        results = _operator(*arguments)
    else:
        results = _LinearCrossEntropy.apply(*arguments, _forward)  # type: ignore[no-untyped-call]
    return CrossEntropy(*results[:2])


def linear_cross_entropy_reference(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target_T: Tensor,
    *,
    scale: float,
    counted_N: Tensor | None = None,
) -> CrossEntropy:
    """Compute linear_cross_entropy one token at a time in fp64, differentiated by autograd: the truth for tests."""
    counted = range(len(target_T)) if counted_N is None else counted_N.tolist()
    hidden, weight, bias = hidden_TD.double(), weight_VD.double(), bias_V.double()
    nll = []
    for t, target in enumerate(target_T.tolist()):
        logit_V = weight @ hidden[t] + bias
        probability_V = logit_V.exp() / logit_V.exp().sum()
        nll.append(-probability_V[target].log() if t in counted else 0 * logit_V.sum())
    nll_T = torch.stack(nll)
    return CrossEntropy(scale * nll_T.sum(), nll_T.detach())


def largest_chunk(width: int) -> int:
    """Return the tokens of a chunk, at most, for hidden states of this width."""
    return max(LEAST_CHUNK, width)


def chunk_tokens(tokens: int, most: int) -> int:
    """Return the tokens of the largest chunk, where chunks of at most so many are as even as they can be.

    Example: 1,000 tokens in chunks of at most 410 are three chunks, of 334, 334 and 332.
    """
    return ceil(tokens / max(1, ceil(tokens / most)))


def _chunks(tokens: int, most: int) -> Iterator[slice]:
    size = max(1, chunk_tokens(tokens, most))
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _forward(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    target_T: Tensor,
    scale: float,
    counted_N: Tensor | None,
    chunk: int,
    grads: bool,
) -> tuple[Tensor, ...]:
    """Return the loss, each token's nats, and the loss's gradients of hidden states, weights and bias; without `grads`
    these are empty."""
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    nll_T = hidden_TD.new_zeros(len(target_T), dtype=wide)
    layer = _Layer(weight_VD, bias_V)
    empty = hidden_TD.new_empty(0)
    d_hidden_TD = torch.zeros_like(hidden_TD) if grads else empty
    d_layer = _Layer(*(torch.zeros_like(x, dtype=wide) for x in layer)) if grads else None
    for part in _chunks(len(target_T) if counted_N is None else len(counted_N), chunk):
        rows = part if counted_N is None else counted_N[part]
        nll_T[rows], d_hidden_cD = _of_chunk(hidden_TD[rows], layer, target_T[rows, None], scale, d_layer)
        if d_hidden_cD is not None:
            d_hidden_TD[rows] = d_hidden_cD
    loss = nll_T.sum() * scale
    if d_layer is None:
        return loss, nll_T, empty, empty.clone(), empty.clone()
    return loss, nll_T, d_hidden_TD, d_layer.weight_VD.to(weight_VD.dtype), d_layer.bias_V.to(bias_V.dtype)


class _Layer(NamedTuple):
    """An output layer, or its gradients."""

    weight_VD: Tensor
    bias_V: Tensor


def _of_chunk(
    hidden_cD: Tensor, layer: _Layer, target_c1: Tensor, scale: float, d_layer: _Layer | None
) -> tuple[Tensor, Tensor | None]:
    """Compute a chunk's nats and, where there are gradients to add to, those of its hidden states. Its logits are freed
    behind it."""
    wide = torch.promote_types(hidden_cD.dtype, torch.float32)
    logit_cV = torch.addmm(layer.bias_V, hidden_cD, layer.weight_VD.T).to(wide)
    chosen_c1, top_c1 = logit_cV.gather(1, target_c1), logit_cV.amax(1, keepdim=True)
    total_c1 = logit_cV.sub_(top_c1).exp_().sum(1, keepdim=True)
    nll_c = (total_c1.log() + top_c1 - chosen_c1).squeeze(1)
    if d_layer is None:
        return nll_c, None
    d_logit_cV = logit_cV.mul_(scale / total_c1)
    d_logit_cV.scatter_add_(1, target_c1, torch.full_like(total_c1, -scale))
    d_layer.bias_V.add_(d_logit_cV.sum(0))
    if wide is hidden_cD.dtype:
        d_layer.weight_VD.addmm_(d_logit_cV.T, hidden_cD)
    else:
        d_logit_cV = d_logit_cV.to(hidden_cD.dtype)
        d_layer.weight_VD.add_(d_logit_cV.T @ hidden_cD)
    return nll_c, d_logit_cV @ layer.weight_VD


def _fake_forward(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, target_T: Tensor, *rest: Any) -> Any:
    wide = torch.promote_types(hidden_TD.dtype, torch.float32)
    loss, nll_T = hidden_TD.new_empty((), dtype=wide), hidden_TD.new_empty(target_T.shape, dtype=wide)
    if not rest[-1]:
        return loss, nll_T, *(hidden_TD.new_empty(0) for _ in range(3))
    return loss, nll_T, *(torch.empty_like(x) for x in (hidden_TD, weight_VD, bias_V))


class _LinearCrossEntropy(torch.autograd.Function):
    """The operator's arguments, and the function that runs it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *arguments, run = inputs
        results: tuple[Tensor, ...] = run(*arguments)
        ctx.save_for_backward(*results[2:])
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * 3
        if d_loss is not None:
            found = [gradient * d_loss for gradient in ctx.saved_tensors]
        return *found, *(None,) * 6


def _below_autograd(*arguments: Any) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(*arguments)  # type: ignore[no-any-return]


def _differentiable(*arguments: Any) -> tuple[Tensor, ...]:
    if not arguments[-1]:
        return _below_autograd(*arguments)
    return _LinearCrossEntropy.apply(*arguments, _below_autograd)  # type: ignore[no-any-return, no-untyped-call]


_library = torch.library.Library("foreroute", "FRAGMENT")
_library.define(
    "linear_cross_entropy(Tensor hidden_TD, Tensor weight_VD, Tensor bias_V, Tensor target_T, float scale,"
    " Tensor? counted_N, int chunk, bool grads) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("linear_cross_entropy", _forward, "CompositeExplicitAutograd")
_library.impl("linear_cross_entropy", _differentiable, "Autograd")
torch.library.register_fake("foreroute::linear_cross_entropy", _fake_forward, lib=_library)
_operator: Callable[..., Any] = torch.ops.foreroute.linear_cross_entropy.default
