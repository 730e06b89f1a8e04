"""The files for other programs in a saved model's folder: its parameters outside the expert layers."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from foreroute.engine.checkpoint import files
from foreroute.engine.optim.model_state import WEIGHT
from foreroute.engine.plug_in.saved.model import NAMES, PlacedModel

_MODEL = "model.safetensors"


def noted(saved: PlacedModel, own: dict[str, Tensor], *, weights_only: bool) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the state of all parameters; on rank 0 keep the values of those outside the expert layers."""
    layers = tuple(f"{name}." for name in saved.layers_of())
    for name, values in saved.state.read_state(weights_only=weights_only):
        if saved.mesh.rank == 0 and not name.startswith(layers):
            own[name] = values[WEIGHT].to("cpu", saved.module.get_parameter(name).dtype)
        yield name, values


def write_host_files(saved: PlacedModel, own: dict[str, Tensor], new: Path) -> None:
    """Write the parameters and buffers outside the expert layers, as the model itself does."""
    layers = tuple(f"{name}." for name in saved.layers_of())
    first = {id(p): name for name, p in saved.module.named_parameters()}
    state = {}
    for name, value in saved.module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and not name.startswith(layers):
            state[name] = own[first[id(value)]] if id(value) in first else value.detach().cpu()
    theirs = getattr(saved.module, "save_pretrained", None)
    if theirs is not None:
        theirs(new, state_dict=state)
        return
    kept: dict[int, str] = {}
    again = {name: kept[id(value)] for name, value in state.items() if kept.setdefault(id(value), name) != name}
    whole = {name: value for name, value in state.items() if name not in again}
    save_file(unshared(whole), new / _MODEL, {"format": "pt", **again})


def keep_others(target: Path, new: Path) -> None:
    """Copy files of others from the folder that is replaced."""
    if not (target / NAMES.manifest).exists():
        return
    before = files.read_manifest(target, NAMES)
    ours = {NAMES.manifest, *before["files"], *before["wrote"]}
    for item in target.iterdir():
        if item.name in ours or (new / item.name).exists():
            continue
        if item.is_dir():
            shutil.copytree(item, new / item.name)
        else:
            shutil.copy2(item, new / item.name)


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the host, each with memory of its own, as safetensors wants them."""
    found, seen = {}, set()
    for key, value in tensors.items():
        own = value.detach().cpu().contiguous()
        if own.untyped_storage().nbytes() != own.nbytes or own.data_ptr() in seen:
            own = own.clone()
        seen.add(own.data_ptr())
        found[key] = own
    return found
