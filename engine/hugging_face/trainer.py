"""transformers' Trainer for models with expert layers, with DeepSpeed or, on one rank, without.

    class ExpertTrainer(PlannedTrainer, Trainer):
        pass

    experts = replace_feed_forwards(model, ...)
    ExpertTrainer(model, args, train_dataset=..., data_collator=...).train(resume_from_checkpoint=...)

Plans are made in a thread of the training process while earlier batches train, and are kept apart from the batches.
So collators and workers of the loader only handle ids, and the model sees no argument of ours. A forward pass outside a
training step (evaluation, generation, or one of the user's own) plans from its arguments when it runs.
"""

import contextlib
import re
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foreroute.engine.errors import require
from foreroute.engine.hugging_face.accelerator import FOLDER, Batch, PlannedBatches, keep_on_host, use_experts
from foreroute.engine.hugging_face.arguments import arguments_of
from foreroute.engine.plug_in import load_pretrained, save_pretrained
from foreroute.engine.plug_in.attached import Attachment
from foreroute.engine.plug_in.live_experts import LiveExperts
from foreroute.engine.plug_in.planned_experts import PlannedExperts
from foreroute.engine.plug_in.plans import Plans
from foreroute.engine.plug_in.replace import experts_of

_CLIPPING = "gradient_clipping"
_BIASES = re.compile(r"\.experts\.b\d$")

if TYPE_CHECKING:

    class _Trainer(Any):  # type: ignore[misc]
        """transformers.Trainer, which is not needed to import this file."""
else:
    _Trainer = object


class PlannedTrainer(_Trainer):
    """Mixin before transformers.Trainer or a subclass of it; the model's feed-forwards are replaced beforehand.

    Beside planning it changes what is wrong otherwise. The optimizer's groups separate sharded experts. max_grad_norm
    applies if the DeepSpeed config has no gradient_clipping, and is right at ZeRO-0. Biases of experts have no weight
    decay. Checkpoints hold the model as save_pretrained of engine.plug_in writes it: with DeepSpeed in global_step<N>,
    with the optimizer, otherwise in foreroute, beside Trainer's optimizer.pt.

    All ranks must have equally many batches, as with Trainer's default samplers.
    """

    plan_ahead = 2
    """Number of batches that are planned ahead; 0 for a loss that calls the model several times or with other ids."""

    experts: PlannedExperts
    _attachment: Attachment | None = None
    _source: Iterator[Batch] | None = None
    _ahead: PlannedBatches
    _taken: list[tuple[Future[Plans], Batch]]

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator for a model with expert layers; Trainer's constructor calls this.

        Raises:
            UserError: the model has no expert layers, comes from model_init or is to run on several GPUs of one
                process; or experts are sharded without DeepSpeed.
        """
        require(self.model is not None, "model_init: a model with expert layers must be given as model")
        self.experts, self._taken = experts_of(self.model), []
        require(self.args.n_gpu < 2, f"{self.args.n_gpu} GPUs in one process: start a process for each with torchrun")
        super().create_accelerator_and_postprocess()
        use_experts(self.accelerator, self.experts)
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.hf_ds_config.config
            config.setdefault(_CLIPPING, self.args.max_grad_norm)  # DeepSpeed's default is 1.0
        if self._attachment is None:
            self._attachment = self.experts.attach_by(self.model, arguments_of(self.model))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of parameters with weight decay; experts' biases have none, as other biases."""
        return [name for name in super().get_decay_parameter_names(model) if not _BIASES.search(name)]

    # Plans.

    def get_train_dataloader(self) -> Any:
        """Return the training loader; its batches stay on the host until their step."""
        loader = super().get_train_dataloader()
        keep_on_host(loader)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of an optimizer step, and the number of their targets; plan those that follow."""
        if not self.plan_ahead:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._source is not epoch_iterator:
            self._source = epoch_iterator
            self._ahead = PlannedBatches(epoch_iterator, self.experts, self.model, self.plan_ahead)
        self._taken = []
        self.model.train()  # plans of an evaluation differ where a router draws
        return super().get_batch_samples(self._take(), num_batches, device)

    def _take(self) -> Iterator[Batch]:
        for planned in self._ahead:
            self._taken.append(planned)
            yield planned[1]

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        """Run a micro-batch forward and backward with its plans."""
        plans = next((plans for plans, batch in self._taken if batch is inputs), None)
        # Without plans it was not planned ahead, or a subclass has changed it: its calls plan.
        with contextlib.nullcontext() if plans is None else self.experts.planned(plans.result()):
            loss = super().training_step(model, inputs, *args, **options)
        if isinstance(self.experts, LiveExperts) and self.accelerator.sync_gradients:
            self.experts.after_step()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a micro-batch, in training with the losses of live routers (moe.balance_loss)."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not isinstance(self.experts, LiveExperts) or not model.training:
            return found
        own = self.experts.auxiliary_loss()
        if num_items_in_batch is not None:  # otherwise training_step divides the whole
            own = own / self.current_gradient_accumulation_steps
        return (found[0] + own, found[1]) if return_outputs else found + own

    # Checkpoints.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model with save_pretrained of engine.plug_in, unless the engine saves it next."""
        folder = Path(output_dir or self.args.output_dir)
        if not (self.is_deepspeed_enabled and _internal_call and not self.args.save_only_model):
            model = self.model_wrapped if self.is_deepspeed_enabled else self.model
            save_pretrained(model, folder / FOLDER, weights_only=True)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_pretrained(self.model if model is None else model, Path(resume_from_checkpoint) / FOLDER)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
