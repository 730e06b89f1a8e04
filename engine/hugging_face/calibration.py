"""Texts for a model of transformers: the lines of a file as padded batches of ids, by the model's own tokenizer."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from foreroute.engine.errors import UserError, require

LONGEST = 128  # ids of a line
_BATCH = 32  # lines


def read_lines(folder: Path | str, text: Path | str, most: int) -> list[dict[str, Tensor]]:
    """Return batches of ids [B, Q] and masks of their padding, lines of like length together.

    Args:
        folder: of the model, with its tokenizer.
        text: a file in UTF-8; its lines that are not empty, the first `most` of them.

    Raises:
        UserError: a file is missing, or the text has no line.
    """
    try:
        lines = [line for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()][:most]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"text={text}: cannot be read ({reason})") from error
    require(len(lines) > 0, f"text={text}: has no line")
    known = any((Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.txt", "vocab.json"))
    require(known, f"model={folder}: has no tokenizer.json, which text={text} needs")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines.sort(key=len)
    found = []
    for first in range(0, len(lines), _BATCH):
        batch = tokenizer(
            lines[first : first + _BATCH], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        found.append({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
    return found
