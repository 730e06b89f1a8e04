"""The arguments of transformers' models from which calls are planned: ids, attention mask and positions, by name.

Letters: B sequences, Q ids of each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from foreroute.engine.errors import UserError, require
from foreroute.engine.plug_in.call_arguments import Call, CallArguments
from foreroute.engine.plug_in.plans import Sequences


@dataclass(frozen=True, slots=True)
class NamedArguments(CallArguments):
    """The arguments that a call of a transformers model has, each [B, Q]; no mask means no padding."""

    pad_token_id: int | None = None
    """The id of padding, if it has no other meaning: without a mask no sequence may begin or end with it."""

    def read(self, call: Call, context: int, side: str = "", *, parts: bool = False) -> Sequences:
        """Return the ids of a call and their context, as CallArguments.read.

        Args:
            side: "decoder" for layers in the decoder of an encoder-decoder model, whose arguments have other names.
            parts: as CallArguments.read.

        Raises:
            UserError: the call has no ids, or padding without a mask; or as CallArguments.read.
        """
        prefix = "decoder_" if side == "decoder" else ""
        ids, mask, positions = f"{prefix}input_ids", f"{prefix}attention_mask", "position_ids"
        given = {name for name, value in call.by_name.items() if isinstance(value, Tensor)}
        if ids not in given:
            raise UserError(
                f"a batch has {', '.join(sorted(map(str, given))) or 'no tensors'}, without {ids}: the collator must"
                " return it under this name; with remove_unused_columns=True, Trainer drops columns that forward lacks"
            )
        if mask not in given:
            self._refuse_padding(call.by_name[ids], ids, mask)
        told = CallArguments(
            ids,
            self.left,
            mask=mask if mask in given else None,
            positions=positions if positions in given else None,
            layout="BQ",
        )
        return told.read(call, context, side, parts=parts)

    def _refuse_padding(self, ids_BQ: Tensor, ids: str, mask: str) -> None:
        if self.pad_token_id is None or not ids_BQ.numel():
            return
        padded = int((ids_BQ[..., [0, -1]] == self.pad_token_id).any(-1).sum())
        require(
            not padded,
            f"a batch has no {mask}, but {padded} of its {len(ids_BQ)} sequences of {ids} begin or end with the"
            f" pad_token_id {self.pad_token_id}: the collator must return {mask}, 0 for padding",
        )


def arguments_of(model: torch.nn.Module) -> NamedArguments:
    """Return the arguments of a transformers model; its config names the id of padding."""
    config = getattr(model, "config", None)
    pad: int | None = getattr(config, "pad_token_id", None)
    others: list[int | None] = []
    for name in ("eos_token_id", "bos_token_id"):
        value = getattr(config, name, None)
        others += value if isinstance(value, list) else [value]
    return NamedArguments("input_ids", pad_token_id=None if pad in others else pad)
