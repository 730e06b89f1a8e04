"""The slices of all-MiniLM-L6-v2: kept activation, embeddings before and after a short training, and time.

The feed-forwards are cut into 8 slices each. Which k of them a token gets is chosen by a table of its id, by a live
router that was trained for it, or at random by its id. The calibration text, on which tables and routers are made and
on which the models are trained, is of SST-2's train.tsv; figures are of its dev.tsv.

Letters: B sentences, Q ids, T tokens, E slices, K active ones.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.bench_convert.families import convert
from benchmarks.harness import interleave
from examples.hugging_face.minilm import batches, embeddings, make_model, pooled
from foreroute.engine.config import MoEConfig
from foreroute.engine.convert import Copies, Slices, train_slice_routers
from foreroute.engine.convert.selection import kept_share, layer_inputs, mass_of, sliced_layers
from foreroute.engine.convert.slice_router import SLICE_ROUTER
from foreroute.engine.finetune.glue import read_examples
from foreroute.engine.hugging_face.dense_models import plan_family_slices
from foreroute.engine.plug_in.planned_experts import PlannedExperts
from foreroute.engine.routing.planned.token_table import Options, read_table

SLICES, KS = 8, (8, 4, 2)
_LONG = 40  # bytes of a calibration sentence; train.tsv has many phrases of a few words
_LR = 1e-4

Batch = dict[str, Tensor]


class Chosen(NamedTuple):
    """A model whose slices are chosen in one way."""

    model: Any
    experts: PlannedExperts


def sentences(folder: Path, calibration: int, held_out: int) -> tuple[list[str], list[str]]:
    """Return sentences of train.tsv to calibrate and train on, and the first ones of dev.tsv."""
    train = [one.text.decode() for one in read_examples(folder / "train.tsv") if len(one.text) >= _LONG]
    generator = torch.Generator().manual_seed(0)
    drawn = [train[i] for i in torch.randperm(len(train), generator=generator)[:calibration].tolist()]
    return drawn, [one.text.decode() for one in read_examples(folder / "dev.tsv")][:held_out]


def choices(dense: Any, calibration: Sequence[Batch], file: Path) -> dict[str, Chosen]:
    """Convert the model with a table, a trained live router, and a table of random orders."""
    found = {}
    moe: dict[str, Any] = {"experts": SLICES, "k": SLICES}
    model = copy.deepcopy(dense)
    planned = plan_family_slices(model, calibration, moe=MoEConfig(experts=SLICES, ngram=1), file=file)
    options: dict[str, Any] = {"router": planned.router, "options": planned.options}
    found["table"] = Chosen(model, convert(model, Slices(), **moe, **options))
    model = copy.deepcopy(dense)
    found["live"] = Chosen(model, convert(model, Slices(), **moe, router=SLICE_ROUTER))
    train_slice_routers(model, calibration)
    model = copy.deepcopy(dense)
    found["random"] = Chosen(model, convert(model, Slices(), **moe))
    return found


@torch.no_grad()
def kept(found: dict[str, Chosen], given: Sequence[Batch], file: Path) -> dict[str, dict[int, float]]:
    """Return the share of the activation of all layers that the chosen k slices have, and that of the best k."""
    model = found["live"].model
    found["live"].experts.k = SLICES
    layers = sliced_layers(model)
    tables = [torch.from_numpy(read_table(Options(file=str(file)), number)).long() for number in range(len(layers))]
    masses: list[Tensor] = []
    orders: dict[str, list[Tensor]] = {"table": [], "live": [], "random": [], "best": []}
    generator = torch.Generator().manual_seed(0)
    for batch, inputs in layer_inputs(model, {name: model.get_submodule(name) for name in layers}, given):
        real = batch["attention_mask"].bool()
        for table, (name, layer) in zip(tables, layers.items(), strict=True):
            x_TD = inputs[name][real]
            mass_TE = mass_of(layer, x_TD)
            masses.append(mass_TE)
            assert layer.router is not None
            orders["table"].append(table[batch["input_ids"][real]])
            orders["live"].append(layer.router(x_TD, SLICES).route.expert_TK)
            orders["random"].append(torch.rand(mass_TE.shape, generator=generator).argsort(dim=1))
            orders["best"].append(mass_TE.argsort(dim=1, descending=True))
    mass_TE = torch.cat(masses)
    return {name: {k: kept_share(mass_TE, torch.cat(one)[:, :k]) for k in KS} for name, one in orders.items()}


def cosines(chosen: Chosen, want_ND: Tensor, given: Sequence[Batch]) -> dict[int, float]:
    """Return the mean cosine of the sentences' embeddings to those of the dense model, for each k."""
    found = {}
    for k in KS:
        chosen.experts.k = k
        found[k] = (embeddings(chosen.model, given) * want_ND).sum(1).mean().item()
    return found


def distil(chosen: Chosen, dense: Any, given: Sequence[Batch], steps: int) -> list[float]:
    """Train a model towards the dense model's hidden states, at a k drawn for each step; return the losses.

    The loss is the squared difference of the last hidden states divided by the dense ones' square, plus 1 - cosine of
    the embeddings.
    """
    optimizer = torch.optim.Adam(chosen.model.parameters(), lr=_LR)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        batch = given[int(torch.randint(len(given), (), generator=generator))]
        chosen.experts.k = KS[int(torch.randint(len(KS), (), generator=generator))]
        mask_BQ = batch["attention_mask"]
        with torch.no_grad():
            want_BQD = dense(**batch).last_hidden_state
        got_BQD = chosen.model(**batch).last_hidden_state
        real = mask_BQ.bool()
        loss = ((got_BQD - want_BQD)[real] ** 2).sum() / (want_BQD[real] ** 2).sum()
        loss = loss + 1 - (pooled(got_BQD, mask_BQ) * pooled(want_BQD, mask_BQ)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def times(dense: Any, table: Chosen, batch: Batch, rounds: int) -> dict[str, float]:
    """Return the time of a forward pass with its plan, divided by that of the dense model, fastest of rounds."""
    copied = copy.deepcopy(dense)
    copies = Chosen(copied, convert(copied, Copies(), experts=SLICES, k=1))

    def case(chosen: Chosen, k: int) -> Any:
        def run() -> None:
            chosen.experts.k = k
            embeddings(chosen.model, [batch])

        return run

    cases = {"dense": lambda: embeddings(dense, [batch])}
    cases |= {f"{name} k={k}": case(one, k) for name, one in (("slices", table), ("copies", copies)) for k in KS}
    cases["copies k=1"] = case(copies, 1)
    seconds = {name: min(values) for name, values in interleave(cases, rounds).items()}
    return {name: value / seconds["dense"] for name, value in seconds.items() if name != "dense"}


def measure(folder: Path, file: Path, *, calibration: int, held_out: int, steps: int, rounds: int) -> dict[str, Any]:
    """Measure everything.

    Args:
        folder: of train.tsv and dev.tsv.
        file: for the tables.
        calibration, held_out: numbers of sentences.
        steps: of training, each with 32 sentences.
    """
    dense = make_model()
    to_train, to_report = sentences(folder, calibration, held_out)
    train, dev = (list(batches(sorted(texts, key=len))) for texts in (to_train, to_report))
    want_ND = embeddings(dense, dev)
    found = choices(dense, train, file)
    result: dict[str, Any] = {"kept": kept(found, dev, file)}
    print(f"kept: {result['kept']}", flush=True)
    result["time"] = times(dense, found["table"], dev[len(dev) // 2], rounds)
    print(f"time: {result['time']}", flush=True)
    result["before"] = {name: cosines(chosen, want_ND, dev) for name, chosen in found.items()}
    print(f"before: {result['before']}", flush=True)
    trained = {name: found[name] for name in ("table", "live")}
    result["losses"] = {name: distil(chosen, dense, train, steps) for name, chosen in trained.items()}
    result["after"] = {name: cosines(chosen, want_ND, dev) for name, chosen in trained.items()}
    return {**result, "sentences": len(to_report), "calibration": len(to_train), "steps": steps}
