"""Encoders with a head for a task, as engine/finetune/loop.py trains them.

    AnswerModel   one answer of several: the label of a text, or the right one of the choices after a question
    MaskedModel   the ids under the masks

For an answer the hidden states of a sequence are averaged over its ids, as sentence encoders such as MiniLM have it.
Padding has no expert.

Letters: B examples, or sequences in a TokenBatch, S sequences of all examples, Q ids of the longest one, D width, A
answers, N masked ids, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreroute.engine.finetune.accuracy import Accuracy, right_answers
from foreroute.engine.finetune.masking import NOT_ASKED, Masked, mask_ids
from foreroute.engine.finetune.sentences import by_length, training_places
from foreroute.engine.finetune.trainee import Evaluation, Trainee
from foreroute.engine.hugging_face.encoders.texts import TokenBatch, TokenSequence, WordPieces
from foreroute.engine.plug_in import mean_over_ranks
from foreroute.engine.plug_in.planned_experts import PlannedExperts

EVALUATED = 64
"""Sequences in a batch without gradients."""

_INIT_STD, _SCALE = 0.02, 20.0


@dataclass(frozen=True, slots=True)
class Item:
    """An example: a text with a label, or a question with choices and the place of the right one."""

    text: TokenSequence
    label: int
    choices: tuple[TokenSequence, ...] = ()

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        """All that the encoder reads."""
        return (self.text, *self.choices)


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """Examples side by side."""

    texts: TokenBatch
    choices: TokenBatch | None  # of all examples, one after the other; a pass of their own, as they are short
    label_B: Tensor  # int64

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.label_B)


@dataclass(frozen=True, slots=True)
class MaskedBatch:
    """Masked sequences side by side."""

    tokens: TokenBatch  # with the masked ids
    label_BQ: Tensor  # int64, NOT_ASKED where nothing is to be restored

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.label_BQ)


class Encoder(nn.Module):
    """An encoder of transformers that plans each of its passes.

    Args:
        model: called with input_ids and attention_mask; its result has last_hidden_state.
        experts: of its feed-forwards; None for a dense one.
    """

    def __init__(self, model: nn.Module, experts: PlannedExperts | None) -> None:
        super().__init__()
        self.model, self.experts = model, experts

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def forward(self, tokens: TokenBatch, k: int) -> Tensor:
        """Return the hidden states [B, Q, D] at k active experts; the batch is on the host.

        Plans follow from the ids of the batch and from nothing else: labels do not come here.
        """
        planned: AbstractContextManager[Any] = nullcontext()
        if self.experts is not None:
            self.experts.k = k
            planned = self.experts.planned(tokens.ids_BQ, mask=tokens.mask_BQ)
        ids_BQ, mask_BQ = tokens.ids_BQ.to(self.device), tokens.mask_BQ.to(self.device)
        with planned:
            hidden_BQD: Tensor = self.model(input_ids=ids_BQ, attention_mask=mask_BQ).last_hidden_state
        return hidden_BQD


class LabelHead(nn.Sequential):
    """Logits of the labels of a text: linear, tanh, dropout, linear, as in SMoE-Dropout's public SST-2 code."""

    def __init__(self, width: int, answers: int, dropout: float) -> None:
        super().__init__(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, answers))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0.0, _INIT_STD)
                nn.init.zeros_(layer.bias)


class ChoiceHead(nn.Module):
    """Logits of choices: 20 times the cosine between the question and each choice, as sentence encoders are trained
    (Sentence-BERT, arXiv 1908.10084). It has no weights, so a pre-trained encoder answers from the start."""

    def forward(self, question_BD: Tensor, choice_BAD: Tensor) -> Tensor:
        """Return the logits [B, A]."""
        logits_BA: Tensor = _SCALE * F.cosine_similarity(question_BD[:, None], choice_BAD, dim=-1)
        return logits_BA


class AnswerModel(Trainee):
    """An encoder that answers.

    Args:
        head: LabelHead for texts, ChoiceHead for questions with choices.
    """

    def __init__(self, encoder: Encoder, words: WordPieces, head: LabelHead | ChoiceHead) -> None:
        super().__init__()
        self.encoder, self.words, self.head = encoder, words, head

    def forward(self, batch: AnswerBatch, k: int) -> Tensor:
        """Return the logits [B, A], fp32."""
        mean_BD = self._mean(batch.texts, k)
        if batch.choices is None:
            logits_BA: Tensor = self.head(mean_BD)
            return logits_BA
        logits_BA = self.head(mean_BD, self._mean(batch.choices, k).unflatten(0, (len(batch), -1)))
        return logits_BA

    def _mean(self, tokens: TokenBatch, k: int) -> Tensor:
        """Return the mean hidden state of each sequence, fp32."""
        hidden_BQD = self.encoder(tokens, k)
        real_BQ1 = tokens.mask_BQ.to(hidden_BQD.device, hidden_BQD.dtype)[..., None]
        mean_BD: Tensor = (hidden_BQD * real_BQ1).sum(dim=1) / real_BQ1.sum(dim=1)
        return mean_BD.float()

    def batches(self, examples: Sequence[Item], batch: int, seed: int) -> Iterator[AnswerBatch]:
        """Yield training batches without end."""
        for places in training_places([len(item.text.ids) for item in examples], batch, seed):
            yield self._batch([examples[i] for i in places])

    def loss(self, batch: AnswerBatch, k: int, seed: int = 0) -> Tensor:
        """Return the mean cross entropy of the answers in nats; over all ranks, which may have unequal numbers."""
        logits_BA = self(batch, k)
        loss = F.cross_entropy(logits_BA, batch.label_B.to(logits_BA.device), reduction="sum")
        return mean_over_ranks(loss, len(batch))

    def evaluate(self, examples: Sequence[Item], k: int) -> Evaluation:
        """Count the right answers at k active experts."""
        logits, places = [], []
        for cut in by_length([len(item.text.ids) for item in examples], range(len(examples)), EVALUATED):
            logits.append(_without_gradients(self, self._batch([examples[i] for i in cut]), k))
            places += cut
        logits_BA, label_B = torch.cat(logits), torch.tensor([examples[i].label for i in places])
        return Evaluation(right_answers(logits_BA, label_B), F.cross_entropy(logits_BA, label_B).item())

    def _batch(self, items: Sequence[Item]) -> AnswerBatch:
        choices = [choice for item in items for choice in item.choices]
        return AnswerBatch(
            self.words.pad([item.text for item in items]),
            self.words.pad(choices) if choices else None,
            torch.tensor([item.label for item in items]),
        )


class MaskedModel(Trainee):
    """An encoder that restores masked ids.

    Args:
        head: from hidden states [N, D] to logits [N, V].
    """

    def __init__(self, encoder: Encoder, words: WordPieces, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.words, self.head = encoder, words, head

    def forward(self, batch: MaskedBatch, k: int) -> Tensor:
        """Return the logits [N, V] at the ids that are asked for, row by row."""
        hidden_BQD = self.encoder(batch.tokens, k)
        asked_BQ = (batch.label_BQ != NOT_ASKED).to(hidden_BQD.device)
        logits_NV: Tensor = self.head(hidden_BQD[asked_BQ]).float()
        return logits_NV

    def batches(self, examples: Sequence[TokenSequence], batch: int, seed: int) -> Iterator[MaskedBatch]:
        """Yield training batches without end, masked anew each time."""
        generator = torch.Generator().manual_seed(seed)
        for places in training_places([len(one.ids) for one in examples], batch, seed):
            yield self.masked([examples[i] for i in places], generator)

    def masked(self, sequences: Sequence[TokenSequence], generator: torch.Generator) -> MaskedBatch:
        """Return sequences side by side, masked."""
        tokens = self.words.pad(sequences)
        found: Masked = mask_ids(tokens.ids_BQ, self.words.vocabulary, generator)
        return MaskedBatch(TokenBatch(found.ids_BQ, tokens.mask_BQ), found.label_BQ)

    def loss(self, batch: MaskedBatch, k: int, seed: int = 0) -> Tensor:
        """Return the mean cross entropy of the masked ids in nats; over all ranks, which may have unequal numbers.

        Without a masked id it is 0.
        """
        logits_NV = self(batch, k)
        label_N = batch.label_BQ[batch.label_BQ != NOT_ASKED].to(logits_NV.device)
        return mean_over_ranks(F.cross_entropy(logits_NV, label_N, reduction="sum"), len(label_N))

    def evaluate(self, examples: Sequence[TokenSequence], k: int) -> Evaluation:
        """Count the masked ids that are restored at k active experts; the masks are the same in every call."""
        generator = torch.Generator().manual_seed(0)
        right = count = 0
        loss = 0.0
        for cut in by_length([len(one.ids) for one in examples], range(len(examples)), EVALUATED):
            batch = self.masked([examples[i] for i in cut], generator)
            logits_NV, label_N = _without_gradients(self, batch, k), batch.label_BQ[batch.label_BQ != NOT_ASKED]
            right += int((logits_NV.argmax(dim=1) == label_N).sum())
            count, loss = count + len(label_N), loss + F.cross_entropy(logits_NV, label_N, reduction="sum").item()
        return Evaluation(Accuracy(right, max(count, 1)), loss / max(count, 1))


def _without_gradients(model: AnswerModel | MaskedModel, batch: AnswerBatch | MaskedBatch, k: int) -> Tensor:
    """Return the logits of a batch on the host, without dropout."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        logits: Tensor = model(batch, k).cpu()
    model.train(was_training)
    return logits
