"""The dense form of a model whose feed-forwards were cut into slices (engine/convert/split.py)."""

from torch import Tensor, nn

from foreroute.engine.convert.split import SlicedFeedForward
from foreroute.engine.errors import require
from foreroute.engine.optim.expert_sharding import whole_state
from foreroute.engine.plug_in.planned_layer import PlannedFeedForward
from foreroute.engine.plug_in.replace import experts_of


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's state with its slices as dense feed-forwards again, whole and on the host.

    All slices together are the dense feed-forward, trained or not. It is a collective over all ranks, which all return
    the same. Untrained weights are those of the dense model bit for bit.

    Raises:
        UserError: a layer is no slices: copies and adapters have no dense form once they are trained.
        RuntimeError: experts are sharded, and DeepSpeed has not created their group yet.
    """
    comm = experts_of(model).connect()
    sliced = {name: module for name, module in model.named_modules() if isinstance(module, SlicedFeedForward)}
    layers = [name for name, module in model.named_modules() if isinstance(module, PlannedFeedForward)]
    others = [name for name in layers if not any(name == f"{outer}.experts" for outer in sliced)]
    require(not others, f"{', '.join(others)}: must be slices; only they have a dense form. save_pretrained has all")
    state, of_layer = whole_state(model, sliced, comm)
    for name, module in sliced.items():
        state |= {f"{name}.{key}": value for key, value in module.dense_parameters(of_layer[name]).items()}
    return state
