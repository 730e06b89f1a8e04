"""Read-ME's router (Cai et al., NeurIPS 2024, arXiv 2410.19123): a small network on the ids chooses the experts once
for all layers, apart from the model.

It replaces the gates of all layers, and what they wait for: the choice is made in the loader. The network is an
embedding of its own, one layer of causal attention over the segment, and a linear map to the experts:

    h = embedding of the id;  c_i = sum_j softmax_j((Q h_i) (K h_j) / sqrt(H)) V h_j over j <= i;  logits = O (h + c)

A token has the k experts with the largest logits, each with weight 1/k. The network is drawn at random, or read from a
file (moe.options.weights): published is to train it by turns with the experts, which is left out.

All ranks of an expert group choose for all of its tokens, and must choose alike. Networks differ in the last bit
between machines, and near-ties turn. So this one is computed in integers, which are exact in any order: weights and
states are multiples of 1/64, and exp is a table. It needs no exchange of choices.

The example shows a choice for each token instead of rows of a table. It sees a segment alone: no ids left of it, nor
the documents in it. Generation goes id by id, so it has other choices than training there.

Letters: N streams of the group, Q segment length, H width of the network, V vocabulary, E experts, T tokens of a rank,
P ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from foreroute.engine.config import MoEConfig
from foreroute.engine.config.option import option
from foreroute.engine.errors import UserError, require
from foreroute.engine.routing.method_options import Card, read_options
from foreroute.engine.routing.planned_router import GroupTokens, PlannedRouter, RouterInputs
from foreroute.engine.routing.row_sets import Choice, RowSets, column_dtype, equal_weights

Integers = NDArray[np.int64]
ONE = 64  # of weights and states
STEPS = 16  # of the table of exp, for each unit of the exponent
EXP = np.array([round(65536 * np.exp(-step / STEPS)) for step in range(12 * STEPS)] + [0])
NAMES = "embedding", "query", "key", "value", "output"
_LARGEST = 1 << 14  # of a weight: the sums of a million products stay far below 2^63


@dataclass
class Options:
    """The method's own options."""

    width: int = option(16, "Width of the network (H). Larger: more to compute in the loader.", at_least=1)
    weights: str = option(
        "",
        "A safetensors file with the network's embedding [V, H], query, key and value [H, H] and output [E, H], so that"
        " Q h is query @ h. Empty: drawn at random.",
    )


class NetworkRouter(PlannedRouter):
    """The network, for all layers."""

    card = Card(
        "the k largest logits of a small causal network on the ids, once for all layers, weights 1/k",
        "Read-ME, arXiv 2410.19123",
        "as hashed, and the network in the loader",
        "routers that are trained apart from the model",
    )
    uses = ("options",)
    at_most_k = True

    def __init__(self, network: Mapping[str, Integers]) -> None:
        """Take the network's weights in units of 1 / ONE."""
        super().__init__(len(network["output"]))
        self.network = dict(network)

    @classmethod
    def build(cls, moe: MoEConfig, inputs: RouterInputs) -> Sequence[Self]:
        """Make the router of all layers.

        Raises:
            UserError: the file cannot be read, or does not fit.
        """
        options = read_options(moe, Options)
        width = options.width
        shapes = dict.fromkeys(NAMES, (width, width))
        shapes |= {"embedding": (inputs.vocab_size, width), "output": (moe.experts, width)}
        if options.weights:
            return [cls(_read(Path(options.weights), shapes))]
        draw = np.random.Generator(np.random.PCG64(inputs.seed))
        found = {name: draw.standard_normal(shape) for name, shape in shapes.items()}
        for name in ("query", "key", "value"):
            found[name] /= np.sqrt(width)
        return [cls({name: _units(value) for name, value in found.items()})]

    @classmethod
    def restore(cls, moe: MoEConfig, inputs: RouterInputs, states: Sequence[Mapping[str, Tensor]]) -> Sequence[Self]:
        """Take the saved network."""
        return [cls({name: value.numpy() for name, value in state.items()}) for state in states]

    def choose(self, tokens: GroupTokens, k: int) -> Choice:
        """Run the network on the group's ids."""
        logits_NQE = logits(tokens.ids[0].numpy(), self.network)
        order_TE = (-logits_NQE.reshape(-1, self.experts)).argsort(axis=1, kind="stable")
        order_TK = torch.from_numpy(order_TE[:, :k].astype(column_dtype(self.experts)))
        return Choice(np.arange(len(order_TK)).reshape(tokens.shape), RowSets(order_TK, equal_weights))

    def state(self) -> dict[str, Tensor]:
        """Return the network."""
        return {name: torch.from_numpy(value) for name, value in self.network.items()}

    def identity(self, *, weights: bool = True) -> Sequence[NDArray[Any]]:
        """Return the network and the table of exp."""
        return [EXP, *(self.network[name] for name in NAMES)]


def logits(ids_NQ: NDArray[np.integer[Any]], network: Mapping[str, Integers]) -> Integers:
    """Return the network's logits [N, Q, E] in units of 1 / ONE^2."""
    embedding, query, key, value, output = (network[name] for name in NAMES)
    h_NQH = embedding[ids_NQ]
    query_NQH, key_NQH, value_NQH = (h_NQH @ weight.T // ONE for weight in (query, key, value))
    # how many steps of the table each score is below the largest of its token
    score_NQQ = query_NQH @ key_NQH.transpose(0, 2, 1) * STEPS // isqrt(embedding.shape[1] * ONE**4)
    after_QQ = np.triu(np.ones(score_NQQ.shape[1:], bool), 1)
    score_NQQ[:, after_QQ] = np.iinfo(np.int64).min // 2
    below_NQQ = score_NQQ.max(axis=2, keepdims=True) - score_NQQ
    share_NQQ = EXP[np.minimum(below_NQQ, len(EXP) - 1)]
    context_NQH = share_NQQ @ value_NQH // share_NQQ.sum(axis=2, keepdims=True)
    found: Integers = (h_NQH + context_NQH) @ output.T
    return found


def _units(value: NDArray[Any]) -> Integers:
    return np.rint(value.astype(np.float64) * ONE).clip(-_LARGEST, _LARGEST).astype(np.int64)


def _read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Integers]:
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"moe.options.weights={path}: cannot be read ({error})") from error
    for name, shape in shapes.items():
        got = found[name].shape if name in found else None
        require(got == shape, f"moe.options.weights={path}: {name} has the shape {got}, must be {shape}")
    return {name: _units(found[name]) for name in shapes}
