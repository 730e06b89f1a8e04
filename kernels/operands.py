"""Arguments and results of an expert layer's operations: weights, tensors saved for backward, gradients; their checks.

Letters: R token rows, N expert rows, L experts here, D width, F expert hidden width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from foreroute.kernels.activations import ACTIVATIONS
from foreroute.kernels.dropout import Dropout
from foreroute.kernels.expert_index import ExpertRows
from foreroute.kernels.launching import MAX_ROWS, is_interpreted

BACKENDS = ("cpu", "triton", "reference")
MODES = ("lean", "fast")
PRECISIONS = ("ieee", "tf32")
_ALIGNMENT = 16  # bytes: the widest access of a GPU thread


class ExpertWeights(NamedTuple):
    """Stacked parameters of the local experts; w3 only with a gate."""

    w1_LFD: Tensor
    b1_LF: Tensor
    w2_LFD: Tensor  # second product, stored with the hidden unit first: y = a @ w2
    b2_LD: Tensor
    w3_LFD: Tensor | None = None


class Saved(NamedTuple):
    """The tensors that the forward pass saves for backward besides its inputs; unused ones are empty."""

    hidden_NF: Tensor  # the pre-activation; for ReLU without a gate the hidden units after activation and dropout
    gate_NF: Tensor  # with a gate: its input w3 x
    x_ND: Tensor  # mode "fast": the gathered token rows
    tile_map: Tensor  # "triton", if backward may follow: int32 [tiles, 2], expert and first expert row of each tile


class Options(NamedTuple):
    """How an operation is executed; see kernels.expert_ffn."""

    backend: str
    mode: str
    precision: str


class FfnGradients(NamedTuple):
    """Gradients of an expert feed-forward."""

    x_RD: Tensor
    weights: ExpertWeights
    weight_N: Tensor | None  # of the mixing weights, if requested


def resolve_options(x: Tensor, backend: str | None, mode: str, precision: str) -> Options:
    """Check the execution options and choose the backend if the caller did not.

    Raises:
        ValueError: a value is unknown or the backend does not support it.
    """
    backend = resolve_backend(x, backend)
    check_choice("mode", mode, MODES)
    check_choice("precision", precision, PRECISIONS)
    if mode == "fast" and backend != "cpu":
        raise ValueError(f"mode='fast': backend {backend!r} has only 'lean'")
    if precision == "tf32" and backend != "triton":
        raise ValueError(f"precision='tf32': backend {backend!r} has only 'ieee'")
    return Options(backend, mode, precision)


def resolve_activation(activation: str | None, weights: ExpertWeights) -> str:
    """Return the caller's activation, by default SwiGLU's with a gate and ReLU without.

    Raises:
        ValueError: the activation is unknown.
    """
    if activation is None:
        return "relu" if weights.w3_LFD is None else "silu"
    check_choice("activation", activation, tuple(ACTIVATIONS))
    return activation


def resolve_backend(x: Tensor, backend: str | None) -> str:
    """Return the caller's backend, by default "triton" for tensors on a GPU and "cpu" otherwise.

    Raises:
        ValueError: the backend is unknown or cannot run where the tensor is.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"the input is a {type(x).__name__}: must be a tensor")
    if backend is None:
        return "triton" if x.is_cuda else "cpu"
    check_choice("backend", backend, BACKENDS)
    if backend == "triton" and not (x.is_cuda or is_interpreted()):
        raise ValueError(
            f"backend='triton': the tensors are on {x.device}; needs a GPU, or TRITON_INTERPRET=1 set before start"
        )
    if backend == "cpu" and x.is_cuda:
        raise ValueError(f"backend='cpu': the tensors are on {x.device}")
    return backend


def wants_grad(*tensors: Tensor | None) -> bool:
    """Return whether backward may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def pack_weights(weights: ExpertWeights) -> list[Tensor]:
    """Return the weights as the list that a custom operator takes: four, or five with the gate."""
    return [w for w in weights if w is not None]


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, *, aligned: bool = False) -> None:
    """Raise ValueError unless a tensor has this shape, is on the device of `like` and contiguous; if `aligned`, also
    16-byte aligned."""
    if (
        not aligned
        and isinstance(tensor, Tensor)
        and tensor.shape == shape
        and tensor.device == like.device
        and tensor.is_contiguous()
    ):
        return  # the usual case, which must be cheap for the host
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}: must be a tensor")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be {shape}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}: must be on {like.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}: must be contiguous")
    without_memory = torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)
    if aligned and not without_memory and tensor.data_ptr() % _ALIGNMENT:
        raise ValueError(
            f"{name} starts at an address that is no multiple of {_ALIGNMENT}: clone() makes an aligned copy"
        )


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError unless a tensor has one of these dtypes."""
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} is {tensor.dtype}: must be {' or '.join(str(dtype) for dtype in allowed)}")


def check_float(name: str, tensor: Tensor, backend: str) -> None:
    """Raise ValueError unless the backend computes in this dtype."""
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    check_dtype(name, tensor, allowed if backend == "triton" else (*allowed, torch.float64))


def check_dropout(dropout: Dropout | None, x_RD: Tensor) -> None:
    """Raise ValueError unless the dropout's rate, seed and token numbers are valid."""
    if dropout is None:
        return
    if not isinstance(dropout, Dropout):
        raise ValueError(f"dropout is a {type(dropout).__name__}: must be Dropout(rate, seed, token_R)")
    if not (isinstance(dropout.rate, float | int) and isinstance(dropout.seed, int | Tensor)):
        raise ValueError("dropout: rate must be a number and seed a whole number or its words")
    if not 0.0 <= dropout.rate < 1.0:
        raise ValueError(f"dropout.rate={dropout.rate}: must be in [0, 1)")
    if isinstance(dropout.seed, Tensor):
        check_dtype("dropout.seed", dropout.seed, (torch.int32,))
        check_tensor("dropout.seed", dropout.seed, (2,), x_RD)
    check_dtype("dropout.token_R", dropout.token_R, (torch.int64,))
    check_tensor("dropout.token_R", dropout.token_R, (x_RD.shape[0],), x_RD)


def check_rows(rows: ExpertRows, like: Tensor, *, debug: bool) -> None:
    """Raise ValueError unless expert rows are consistent and fit int32; `debug` also checks every index."""
    if not isinstance(rows, ExpertRows):
        raise ValueError(f"rows is a {type(rows).__name__}: must be ExpertRows, the first of expert_rows' results")
    for name in ("num_rows", "num_inputs"):
        if getattr(rows, name) > MAX_ROWS:
            raise ValueError(f"rows.{name}={getattr(rows, name)}: must be at most {MAX_ROWS}")
    for name, dtype, length in (
        ("source_N", torch.int64, rows.num_rows),
        ("offset_L", torch.int32, rows.num_experts),
        ("slot_N", torch.int64, rows.num_rows),
        ("slot_offset_R", torch.int64, rows.num_inputs),
    ):
        tensor = getattr(rows, name)
        check_dtype(f"rows.{name}", tensor, (dtype,))
        check_tensor(f"rows.{name}", tensor, (length,), like)
    if debug:
        rows.validate()


def check_weights(x_RD: Tensor, weights: ExpertWeights, rows: ExpertRows, backend: str) -> None:
    """Raise ValueError unless token rows, weights and expert rows are consistent and the backend supports them."""
    if not isinstance(weights, ExpertWeights):
        raise ValueError(f"weights is a {type(weights).__name__}: must be ExpertWeights")
    check_float("x_RD", x_RD, backend)
    if not isinstance(weights.w1_LFD, Tensor):
        raise ValueError("w1_LFD is None: only w3_LFD may be left out")
    if weights.w1_LFD.dim() != 3:
        raise ValueError(f"w1_LFD has shape {tuple(weights.w1_LFD.shape)}: must be [L, F, D]")
    num_experts, width_F, width_D = weights.w1_LFD.shape
    if not (width_F and width_D):
        raise ValueError(f"w1_LFD has shape {(num_experts, width_F, width_D)}: widths must be at least 1")
    check_tensor("x_RD", x_RD, (rows.num_inputs, width_D), x_RD, aligned=backend == "triton")
    matrix = (num_experts, width_F, width_D)
    shapes = (matrix, (num_experts, width_F), matrix, (num_experts, width_D), matrix)
    for name, tensor, shape in zip(weights._fields, weights, shapes, strict=True):
        if tensor is None:
            if name != "w3_LFD":
                raise ValueError(f"{name} is None: only w3_LFD may be left out")
            continue
        # No check of alignment: optimizers place weights, and unaligned ones are slower, not wrong.
        check_tensor(name, tensor, shape, x_RD)
        check_dtype(name, tensor, (x_RD.dtype,))
    if rows.num_experts != num_experts:
        raise ValueError(f"rows.offset_L has {rows.num_experts} experts: must be {num_experts}")
