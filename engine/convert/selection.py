"""Which slices a token needs: measured on a calibration text, and put into tables or a live router.

The activation of a slice by a token is the sum of |h| over its hidden units; for ReLU this is the sum of positive
activations of MoEfication (arXiv 2110.01786, section 3.3). A table lists for each key, such as a token id, the slices
by their mean activation; a key that the text does not have gets the order of the mean over all. moe.router=token_table
takes such a table from a file.

Letters: B sequences, Q ids of each, T tokens, D width, E slices, F hidden width of the dense feed-forward, r rows.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foreroute.engine.config import Activation, MoEConfig, RouteWeights
from foreroute.engine.convert.dense import hidden_units
from foreroute.engine.convert.slice_router import SLICE_ROUTER, SliceRouter
from foreroute.engine.convert.split import SlicedFeedForward, Slices
from foreroute.engine.convert.start import begin, number_seed
from foreroute.engine.errors import require
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.routing.ngram_rows import KeyRows
from foreroute.engine.routing.planned.token_table import write_tables

Batches = Iterable[Mapping[str, Any]]
"""Keyword arguments of a model's call, ids [B, Q] among them."""
_PRIOR = 1.0  # tokens of the mean over all that each key begins with


def slice_mass(
    x_TD: Tensor, weights: Mapping[str, Tensor], activation: Activation, order_F: Tensor, slices: int
) -> Tensor:
    """Return what each slice is activated by each token [T, E].

    Args:
        weights: of the dense feed-forward by role (engine/convert/dense.py).
        order_F: its hidden units, slice by slice.
    """
    hidden_TF = hidden_units(x_TD, weights, activation)[:, order_F].abs()
    mass_TE: Tensor = hidden_TF.unflatten(1, (slices, -1)).sum(dim=2)
    return mass_TE


def kept_share(mass_TE: Tensor, expert_TK: Tensor) -> float:
    """Return the share of all tokens' activation that their chosen slices have."""
    return (mass_TE.gather(1, expert_TK).sum() / mass_TE.sum()).item()


def plan_slices(
    model: nn.Module,
    pattern: str,
    batches: Batches,
    *,
    width: int,
    vocab_size: int,
    moe: MoEConfig,
    file: Path | str,
    start: Slices | None = None,
    seed: int = 0,
    ids: str = "input_ids",
    mask: str = "attention_mask",
) -> MoEConfig:
    """Write tables of the slices that each key needs, and return the options of layers that use them.

    Call it before replace_feed_forwards, which then gets these options and the same pattern, start and seed.

    Args:
        model: the dense model; it is called with each batch, in evaluation mode.
        moe: options of the layers; ngram and, above 1, rows say what a key is.
        file: a new file that ends with .safetensors or .npy.
        ids, mask: names of the ids [B, Q] and of the mask of padding, 0, in a batch; a batch may lack the mask.

    Raises:
        UserError: as for replace_feed_forwards, or there is no batch.
    """
    names = [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    require(len(names) > 0, f"pattern {pattern!r}: matches no module")
    start = start or Slices()
    begun = begin(start, model, names, replace(moe, weights=RouteWeights.sum), width)
    orders = {
        name: start.order_of(begun.dense[name], moe, number_seed(seed, number)) for number, name in enumerate(names)
    }
    rows = vocab_size if moe.ngram == 1 else moe.rows
    keys = [KeyRows(moe.ngram, vocab_size, rows, seed, number) for number in range(len(names))]
    sums = [_Means(rows, moe.experts) for _ in names]
    for batch, inputs in layer_inputs(model, begun.modules, batches):
        real = _real(batch, ids, mask)
        left = batch[ids].new_zeros(len(batch[ids]), moe.ngram - 1).cpu()
        for name, key_rows, means in zip(names, keys, sums, strict=True):
            dense = begun.dense[name]
            mass_TE = slice_mass(inputs[name][real], dense.weights, dense.activation, orders[name], moe.experts)
            means.add(key_rows.of(batch[ids].cpu(), left)[real.cpu()], mass_TE.cpu())
    write_tables(Path(file), [means.order() for means in sums])
    return replace(begun.moe, router="token_table", options={"file": str(file)})


def train_slice_routers(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int = 30,
    seed: int = 0,
    ids: str = "input_ids",
    mask: str = "attention_mask",
) -> None:
    """Train the live routers of a model's slices to choose the most active ones.

    Args:
        model: converted with moe.router=SLICE_ROUTER; it is called with each batch, best with all slices active.
        epochs, seed: as for SliceRouter.train_on.
        ids, mask: as for plan_slices.

    Raises:
        UserError: there is no batch, the model has no such routers, or its experts are sharded.
    """
    layers = sliced_layers(model)
    live = bool(layers) and all(isinstance(layer.router, SliceRouter) for layer in layers.values())
    require(live, f"the model has no slices with moe.router={SLICE_ROUTER}")
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    for batch, inputs in layer_inputs(model, {name: model.get_submodule(name) for name in layers}, batches):
        real = _real(batch, ids, mask)
        for name in layers:
            seen[name].append(inputs[name][real])
    for name, layer in layers.items():
        assert isinstance(layer.router, SliceRouter)
        x_TD = torch.cat(seen[name])
        layer.router.train_on(x_TD, mass_of(layer, x_TD), layer.experts.w1.detach(), epochs=epochs, seed=seed)


def sliced_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Return the expert layers of a converted model whose experts are slices, by the names of the feed-forwards."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, SlicedFeedForward)}
    return {name: next(m for m in module.modules() if isinstance(m, MoELayer)) for name, module in found.items()}


@torch.no_grad()
def mass_of(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """Return what each slice of a layer is activated by each token [T, E].

    Raises:
        UserError: experts are sharded.
    """
    experts = layer.experts
    require(len(experts.w1) == layer.num_experts, "experts are sharded: must all be on this rank")
    weights = {role: value.flatten(0, 1) for role, value in experts.named_parameters()}
    order_F = torch.arange(experts.b1.numel(), device=experts.b1.device)
    return slice_mass(x_TD, weights, experts.activation, order_F, layer.num_experts)


class _Means:
    """The sums of the slices' activation by each row of a table."""

    def __init__(self, rows: int, slices: int) -> None:
        self.sum_rE = torch.zeros(rows, slices, dtype=torch.float64)
        self.count_r = torch.zeros(rows, dtype=torch.float64)

    def add(self, row_T: Tensor, mass_TE: Tensor) -> None:
        """Add tokens."""
        self.sum_rE.index_add_(0, row_T, mass_TE.double())
        self.count_r.index_add_(0, row_T, torch.ones(len(row_T), dtype=torch.float64))

    def order(self) -> Tensor:
        """Return each row's slices, the most active first, int64 [r, E]."""
        mean_E = self.sum_rE.sum(0) / self.count_r.sum()
        mean_rE = (self.sum_rE + _PRIOR * mean_E) / (self.count_r + _PRIOR)[:, None]
        return mean_rE.argsort(dim=1, descending=True, stable=True)


@torch.no_grad()
def layer_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Batches
) -> Iterator[tuple[Mapping[str, Any], dict[str, Tensor]]]:
    """Call a model with each batch in evaluation mode; yield the batch and the first argument of each module."""
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: inputs.__setitem__(name, args[0].detach())

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
    training = model.training
    ran = False
    try:
        model.eval()
        for batch in batches:
            model(**batch)
            ran = True
            yield batch, inputs
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    require(ran, "batches: must be at least one")


def _real(batch: Mapping[str, Any], ids: str, mask: str) -> Tensor:
    """Return which ids are no padding, bool [B, Q]."""
    found = batch.get(mask)
    return torch.ones_like(batch[ids], dtype=torch.bool) if found is None else found.bool()
