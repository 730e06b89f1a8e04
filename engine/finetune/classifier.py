"""A language model that classifies sentences: the pre-trained model whole, and a new head on its last hidden state.

The head is that of SMoE-Dropout's public SST-2 code: linear, tanh, dropout, linear, on the hidden state at a sentence's
last id, after the final norm. Unlike there, the embeddings are the pre-trained ones, and no memory goes from one batch
to the next: a sentence is one segment that starts with an empty memory.

Letters: B sentences, Q ids of the longest one, D width, C classes.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreroute.engine.data.planned_batches import group_batch, plan_batch
from foreroute.engine.data.streams import Batch
from foreroute.engine.finetune.accuracy import right_answers
from foreroute.engine.finetune.glue import LABELS
from foreroute.engine.finetune.sentences import Sentence, SentenceBatch, by_length, pad, training_batches
from foreroute.engine.finetune.trainee import Evaluation, Trainee
from foreroute.engine.model.build import RunModel
from foreroute.engine.moe.layer import MoELayer
from foreroute.engine.nested import map_tensors
from foreroute.engine.parallel.cpu_group import CpuGroup
from foreroute.engine.routing.plans.row_plan import plan_rows

_PREDICTED = 64  # sentences in a batch without gradients


class Classifier(Trainee):
    """The model with its head, and the routers that plan for it.

    Args:
        run: its model is used as it is, not copied; model.dropout is the head's, too.
    """

    def __init__(self, run: RunModel) -> None:
        super().__init__()
        config, width = run.config, run.config.model.width
        self.model, self.routers, self.context = run.model, run.routers, config.context
        self.head = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Dropout(config.model.dropout), nn.Linear(width, len(LABELS))
        )
        # longer distances count as the longest one of pre-training: the model never learnt them
        self.clamp_len = config.data.segment + config.model.memory - 1
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0.0, config.model.init_std)
                nn.init.zeros_(layer.bias)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.u.device

    def forward(self, batch: SentenceBatch, k: int, seed: int = 0) -> Tensor:
        """Return the logits [B, C] at k active experts; the batch is on the host.

        Padding has no expert. The balance loss of a learned router is left out.

        Args:
            seed: of (run, step), for the experts' stateless dropout and for routers that draw.
        """
        unplanned = self._unplanned(batch, seed)
        planned = plan_batch(
            group_batch([unplanned]),
            k,
            self.routers,
            held_out=not self.training,
            dropout_seed=seed,
            layers=sum(isinstance(module, MoELayer) for module in self.model.modules()),
            table_rows=plan_rows(self.model.table_keys, [unplanned], CpuGroup())[0],
        )
        batch, routing = map_tensors(lambda tensor: tensor.to(self.device), (batch, planned.routing))
        hidden_BQD = self.model.hidden(batch.ids_BQ, None, routing, memory_len=0, clamp_len=self.clamp_len).hidden_BQD
        row_B = torch.arange(len(batch.length_B), device=self.device)
        logits_BC: Tensor = self.head(hidden_BQD[row_B, batch.length_B - 1])
        return logits_BC

    def batches(self, examples: Sequence[Sentence], batch: int, seed: int) -> Iterator[SentenceBatch]:
        """Yield training batches without end."""
        return training_batches(examples, batch, seed)

    def loss(self, batch: SentenceBatch, k: int, seed: int) -> Tensor:
        """Return the mean loss of the sentences in nats."""
        logits_BC = self(batch, k, seed=seed)
        return F.cross_entropy(logits_BC.float(), batch.label_B.to(logits_BC.device))

    def evaluate(self, examples: Sequence[Sentence], k: int) -> Evaluation:
        """Evaluate sentences at k active experts."""
        logits_BC, label_B = predict(self, examples, k), torch.tensor([sentence.label for sentence in examples])
        return Evaluation(right_answers(logits_BC, label_B), F.cross_entropy(logits_BC, label_B).item())

    def _unplanned(self, batch: SentenceBatch, index: int) -> Batch:
        """Make a batch that routers take: the ids left of a sentence count as 0."""
        ids_BQ, (rows, length) = batch.ids_BQ, batch.ids_BQ.shape
        left_BC = torch.zeros(rows, self.context, dtype=torch.int64)
        real_BQ = torch.arange(length) < batch.length_B[:, None]
        return Batch(ids_BQ, ids_BQ, left_BC, torch.arange(rows), index, fresh=True, real_BQ=real_BQ)


def predict(classifier: Classifier, sentences: Sequence[Sentence], k: int) -> Tensor:
    """Return the logits [number of sentences, C] on the host, in the order of the sentences.

    Routers that draw do so anew for each batch, alike in every call.
    """
    was_training = classifier.training
    classifier.eval()
    logits = torch.empty(len(sentences), len(LABELS))
    with torch.inference_mode():
        lengths = [len(sentence.ids) for sentence in sentences]
        for number, places in enumerate(by_length(lengths, range(len(sentences)), _PREDICTED)):
            batch = pad([sentences[i] for i in places])
            logits[places] = classifier(batch, k, seed=number).float().cpu()
    classifier.train(was_training)
    return logits
