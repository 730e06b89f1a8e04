"""`moe.router=given`: routes that come with the text, recorded elsewhere and replayed token by token.

The planned form of routing replay (R3): routes of one engine, or of an earlier run with a learned router, are fed to
another one, which then differs by no routing decision. Since they are known before the batch arrives, no counts are
exchanged, although a learned router chose them. For those who train on what another engine routed, who compare a
learned choice with a planned one at the same routes, or who want a learned router's choices without its cost.

Routes are plain files, which `python -m launch.record` writes for a run with a live router:

    NAME.npy            uint16 [tokens, layers, k]; experts of a token in order of preference, NONE after the last
    NAME.weights.npy    fp32 [tokens, layers, k], their mixing weights; where there are any
    NAME.json           {"ids_sha256": ids_sha256(ids of the split), "k": experts of a token, on average}

Row i has the routes of the input from which the model predicts id i of the split: the id before it. So there are as
many rows as ids, and row 0 is of the id just before the split (0 before the training split).

Where there is no text of a run, as in a model of the user's own, routes may come with each batch instead
(GroupTokens.routes); then no file is needed.

Letters: P ranks of the expert group, T tokens of a rank, y layers, K experts recorded of a token, r tokens of the group
as rows.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from foreroute.engine.config import MoEConfig, RouteWeights, Split
from foreroute.engine.config.option import option
from foreroute.engine.errors import UserError, require
from foreroute.engine.routing.method_options import Card, read_options
from foreroute.engine.routing.planned_router import (
    NO_EXPERT,
    BatchRoutes,
    GroupTokens,
    PlannedRouter,
    RouterInputs,
    check_use,
)
from foreroute.engine.routing.row_sets import WEIGH, Choice, RowSets, column_dtype, recorded_weights

NONE = NO_EXPERT
_CHUNK = 1 << 20  # tokens checked and ids hashed at a time


@dataclass(frozen=True, slots=True)
class RecordedRoutes:
    """The routes of a split, memory-mapped."""

    path: Path
    expert_TyK: NDArray[np.uint16]
    weight_TyK: NDArray[np.float32] | None
    k: int  # experts of a token, on average
    varies: bool  # tokens have unequal numbers of experts
    digest: bytes

    def refusal(self, k: int) -> str | None:
        """Return why there are no routes of k experts: they are the first of those recorded, or, where tokens have
        unequal numbers, all of them. None: there are."""
        columns = self.expert_TyK.shape[2]
        if k > columns:
            return f"k={k}: {self.path} has {columns} experts of a token, k must be at most {columns}"
        if self.varies and k != self.k:
            return f"k={k}: tokens have unequal numbers of experts in {self.path}, so k must be {self.k}, as recorded"
        return None


@dataclass
class GivenOptions:
    """Options."""

    file: str | None = option(None, "Routes of the training split, a .npy file of uint16 [tokens, layers, k].")
    valid_file: str | None = option(None, "Routes of the valid split; None: it cannot be evaluated.")
    test_file: str | None = option(None, "Routes of the test split; None: it cannot be evaluated.")

    def of_split(self, split: Split) -> str | None:
        """Return the file of a split."""
        return self.file if split is Split.train else getattr(self, _option_of(split), None)


def _option_of(split: Split) -> str:
    return "file" if split is Split.train else f"{split.name}_file"


_WEIGH = {**WEIGH, RouteWeights.table: recorded_weights}  # those that the files have


class GivenRouter(PlannedRouter):
    """Looks a token's experts up by its place in the text; the first k of them are active."""

    card = Card(
        "the experts that a file has for each token, with its weights, equal ones, or a learned gate's",
        "routing replay (R3), arXiv 2510.11370",
        "as hashed; the files are read along with the text",
        "replaying routes of another engine, or of a learned router, without an exchange of counts",
    )
    needs_file = True
    uses = (
        *("options", "share_table", "weights", "gate", "gate_normalised", "gate_scale"),
        *("constant_experts", "copy_experts", "null_experts"),
    )
    of_ids = False
    of_places = True

    def __init__(self, moe: MoEConfig, routes: Mapping[Split, RecordedRoutes], *, layer: int, layers: int) -> None:
        """Take the routes of each split, and the layer whose routes they are, of so many."""
        super().__init__(moe.experts, columns=moe.columns)
        self.routes, self.weights = routes, moe.weights
        self.layer, self.layers = layer, layers

    @classmethod
    def build(cls, moe: MoEConfig, inputs: RouterInputs) -> Sequence[Self]:
        """Open the files and check them. Without a file and without a text, routes come with each batch."""
        options = read_options(moe, GivenOptions)
        if options == GivenOptions() and inputs.splits is None:
            return [cls(moe, {}, layer=layer, layers=inputs.number) for layer in range(inputs.number)]
        require(options.file is not None, "moe.options.file is missing: moe.router=given needs it, such as routes.npy")
        require(
            inputs.splits is not None, "moe.router=given: routes belong to the splits of a run's text; there is none"
        )
        assert inputs.splits is not None
        routes = {}
        for split in Split:
            file = options.of_split(split)
            if file is not None:
                ids = inputs.splits(split)
                try:
                    routes[split] = open_routes(Path(file), ids, layers=inputs.number, columns=moe.columns)
                except UserError as error:
                    raise UserError(f"moe.options.{_option_of(split)}={error}") from error
        without = [found.path for found in routes.values() if found.weight_TyK is None]
        require(
            moe.weights is not RouteWeights.table or not without,
            f"moe.weights=table: there are no weights beside {without[:1]}; take uniform, sum or live",
        )
        return [cls(moe, routes, layer=layer, layers=inputs.number) for layer in range(inputs.number)]

    def refusal(self, split: Split, k: int) -> str | None:
        """Return why a split, or k, has no routes."""
        if not self.routes:
            return None  # they come with the batch
        if split not in self.routes:
            name = _option_of(split)
            return f"moe.options.{name} is missing: moe.router=given needs the routes of the {split.name} split here"
        return self.routes[split].refusal(k)

    def choose(self, tokens: GroupTokens, k: int) -> Choice:
        """Take the routes of the batch, or read the rows of the tokens; ids past the end of a split have those of its
        last id."""
        if tokens.routes is not None:
            expert_rK, weight_rK = self._of_batch(tokens.routes, k)
            used_PT = np.ones(tokens.shape, bool) if tokens.real_PT is None else tokens.real_PT
            varies = bool((expert_rK[used_PT.reshape(-1)] == NONE).any())
        else:
            expert_rK, weight_rK, varies = self._of_text(tokens, k)
        count_r = None
        if varies:
            count_r = torch.from_numpy((expert_rK != NONE).sum(axis=1, dtype=np.int32))
        elif k < expert_rK.shape[1]:
            expert_rK = expert_rK[:, :k]
            weight_rK = None if weight_rK is None else _first(weight_rK, k)
        expert_rK = np.where(expert_rK == NONE, 0, expert_rK)
        order_rK = torch.from_numpy(expert_rK.astype(column_dtype(self.columns)))
        score_rK = None if weight_rK is None else torch.from_numpy(weight_rK)
        sets = RowSets(order_rK, _WEIGH[self.weights], score_rK, count_r)
        return Choice(np.arange(len(order_rK)).reshape(tokens.shape), sets)

    def _of_batch(self, routes: BatchRoutes, k: int) -> tuple[NDArray[np.uint16], NDArray[np.float32] | None]:
        """Return the experts [r, K] and, for moe.weights=table, their weights, of routes that came with the batch."""
        layers, listed = routes.expert_PTyK.shape[2:]
        require(
            layers == self.layers and k <= listed,
            f"routes of {layers} layers and {listed} experts of a token: must be of {self.layers} layers and at least"
            f" k={k} experts",
        )
        expert_rK = routes.expert_PTyK[:, :, self.layer].reshape(-1, listed)
        _check("routes", expert_rK[:, None], 0, self.columns, layer=self.layer)
        if self.weights is not RouteWeights.table:
            return expert_rK, None
        require(
            routes.weight_PTyK is not None,
            "moe.weights=table: routes come without weights; give weights, or take uniform, sum or live",
        )
        assert routes.weight_PTyK is not None
        return expert_rK, routes.weight_PTyK[:, :, self.layer].reshape(-1, listed)

    def _of_text(self, tokens: GroupTokens, k: int) -> tuple[NDArray[np.uint16], NDArray[np.float32] | None, bool]:
        """Return the experts [r, K] of tokens of the run's text, their weights as _of_batch does, and whether they are
        unequal in number."""
        found = tokens.token_places()
        require(
            found is not None and bool(self.routes),
            "moe.router=given: routes are known of the splits of the run's text alone, or come with the batch",
        )
        assert found is not None
        split, place_PT = found
        check_use([self], split, k)
        routes = self.routes[split]
        row_r = np.minimum(place_PT.reshape(-1) + 1, len(routes.expert_TyK) - 1)
        weight_rK = None
        if self.weights is RouteWeights.table:
            assert routes.weight_TyK is not None
            weight_rK = self._read(routes.weight_TyK, row_r)
        return self._read(routes.expert_TyK, row_r), weight_rK, routes.varies

    def _read(self, values_TyK: NDArray[Any], row_r: NDArray[np.int64]) -> NDArray[Any]:
        return np.ascontiguousarray(values_TyK[row_r, self.layer])

    def identity(self, *, weights: bool = True) -> Sequence[NDArray[Any]]:
        """Return the digest of the training split's routes."""
        digests = [np.frombuffer(self.routes[Split.train].digest, "u1")] if self.routes else []
        return [np.array([self.layer, self.experts, self.columns]), *digests]


def _first(weight_rK: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """Return the weights of the first k experts, with the sum that all have: for top-k routers whose weights are a
    softmax, those that they would have at k."""
    first_rk = weight_rK[:, :k]
    part_r1, whole_r1 = (found.sum(axis=1, keepdims=True) for found in (first_rk, weight_rK))
    factor_r1 = np.divide(whole_r1, part_r1, out=np.ones_like(part_r1), where=part_r1 > 0)
    scaled_rk: NDArray[np.float32] = first_rk * factor_r1
    return scaled_rk


def ids_sha256(ids: Any) -> str:
    """Return the sha256 of ids as little-endian uint32."""
    digest = hashlib.sha256()
    for start in range(0, len(ids), _CHUNK):
        digest.update(np.ascontiguousarray(ids[start : start + _CHUNK], "<u4").data)
    return digest.hexdigest()


def create_routes(path: Path, shape: tuple[int, int, int]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Create the files of experts and weights [tokens, layers, k] to be filled in; the routes are whole after
    `finish_routes`.

    Raises:
        UserError: they cannot be written.
    """
    _name(path)
    try:
        path.with_suffix(".json").unlink(missing_ok=True)
        experts = open_memmap(path, mode="w+", dtype=np.uint16, shape=shape)
        weights = open_memmap(path.with_suffix(".weights.npy"), mode="w+", dtype=np.float32, shape=shape)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    experts[:] = NONE
    return experts, weights


def finish_routes(path: Path, ids: Any, k: int) -> None:
    """Write for which ids the routes are, after all of them have been filled in."""
    about = {"ids_sha256": ids_sha256(ids), "k": k}
    path.with_suffix(".json").write_text(json.dumps(about) + "\n", encoding="ascii")


def open_routes(path: Path, ids: Any, *, layers: int, columns: int) -> RecordedRoutes:
    """Open the routes of a split, and check them all.

    Args:
        ids: of the split.
        layers: of the model that have experts.
        columns: experts of a layer.

    Raises:
        UserError: there is no such file, or it is for other ids, another number of layers or other experts.
    """
    _name(path)
    experts, weights = _array(path, np.uint16), None
    assert experts is not None
    about = _about(path.with_suffix(".json"))
    shape = experts.shape
    require(
        len(shape) == 3 and shape[:2] == (len(ids), layers) and shape[2] >= 1,
        f"{path}: has shape {list(shape)}, must be [{len(ids)}, {layers}, k], the symbols of the split and the expert"
        " layers",
    )
    found = ids_sha256(ids)
    require(
        about.get("ids_sha256") == found,
        f"{path}: is for ids with sha256 {str(about.get('ids_sha256'))[:16]}..., the split's are {found[:16]}...",
    )
    weights = _array(path.with_suffix(".weights.npy"), np.float32, missing_ok=True)
    require(
        weights is None or weights.shape == shape,
        f"{path.with_suffix('.weights.npy')}: has shape {weights is not None and list(weights.shape)}, must be"
        f" {list(shape)}",
    )
    digest, varies = hashlib.blake2b(digest_size=8), False
    for start in range(0, shape[0], _CHUNK):
        part = np.asarray(experts[start : start + _CHUNK])
        digest.update(np.ascontiguousarray(part).data)
        varies |= bool((part == NONE).any())
        _check(path, part, start, columns)
        if weights is not None:
            digest.update(np.ascontiguousarray(weights[start : start + _CHUNK]).data)
    k = about.get("k", shape[2])
    require(
        isinstance(k, int) and 1 <= k <= shape[2], f"{path.with_suffix('.json')}: k={k}: must be in 1 .. {shape[2]}"
    )
    return RecordedRoutes(path, experts, weights, k, varies, digest.digest())


def _check(name: str | Path, part: NDArray[np.uint16], start: int, columns: int, layer: int = 0) -> None:
    """Check tokens from number `start` on, and layers from `layer` on: ids in range, each once, those that are there
    before NONE."""
    used = part != NONE
    wrong = used & (part >= columns)
    wrong[..., 1:] |= used[..., 1:] & ~used[..., :-1]
    for back in range(1, part.shape[2]):
        wrong[..., back:] |= used[..., back:] & (part[..., back:] == part[..., :-back])
    if wrong.any():
        token, row, _ = (int(number) for number in np.argwhere(wrong)[0])
        experts = part[token, row].tolist()
        raise UserError(
            f"{name}: token {start + token} has the experts {experts} in layer {layer + row}; must be distinct, in 0 .."
            f" {columns - 1}, and {NONE} only after them"
        )


def _name(path: Path) -> None:
    require(path.suffix == ".npy", f"{path}: must be the name of a .npy file")


def _array(path: Path, dtype: Any, *, missing_ok: bool = False) -> Any:
    if missing_ok and not path.exists():
        return None
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or 'cannot be read'}") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a .npy file ({error})") from error
    require(
        isinstance(found, np.ndarray) and found.dtype == dtype,
        f"{path}: has {getattr(found, 'dtype', type(found).__name__)}, must be {np.dtype(dtype)}",
    )
    return found


def _about(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        require(isinstance(found, dict), f'{path}: must be an object, such as {{"ids_sha256": ".."}}')
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; must have the ids_sha256 of the routes' text") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is no JSON ({error})") from error
    return dict(found)


ROUTER = GivenRouter
