"""Weights, optimizer state and gradients of a rank, as DeepSpeed 0.19.8 holds them at each ZeRO stage.

`held` is held all the time. Gradients need the most in backward or in the optimizer step. The terms were found by
measuring (benchmarks/models/memory_model.py). "All" are the numbers of the rank's parameters, "part" those whose
optimizer state it has. On a CPU, gloo copies the tensors that it gathers and adds up; NCCL does not.
"""

from dataclasses import dataclass
from enum import Enum

from foreroute.engine.certificate.memory.sizes import Parameters, Sizes
from foreroute.engine.certificate.memory.terms import Term, largest, term
from foreroute.engine.optim.zero_defaults import KEPT_WHOLE, MAX_BUCKET

_FETCHED = 50_000_000  # numbers gathered at once at ZeRO-3: DeepSpeed's stage3_prefetch_bucket_size
_LIVE = 1_000_000_000  # numbers that stay gathered at ZeRO-3: its stage3_max_live_parameters


class Phase(Enum):
    """Where in a step."""

    first_layer = "forward, first layer"
    forward = "forward, end"
    backward = "backward"
    backward_end = "backward, end"
    step = "optimizer step"


@dataclass(frozen=True, slots=True)
class GradientProgress:
    """How far gradients are in backward, in numbers of parameters."""

    done: int = 0  # gradient is where it stays
    new: int = 0  # gradient was just made


START = GradientProgress()


@dataclass(frozen=True, slots=True)
class State:
    """A rank's weights, optimizer state and gradients."""

    sizes: Sizes
    parameters: Parameters

    def held(self) -> list[Term]:
        """List the tensors that are held all the time."""
        stage, c, host = self._stage, self.sizes.number, self.sizes.config.train.offload
        numbers, part = self.parameters.numbers, self.parameters.part
        if stage == 0:
            return [
                term("weights", "{} numbers x {} bytes", numbers, c),
                term("Adam moments", "{} moments x {} numbers x {} bytes", 2, numbers, 4),
            ]
        found = [
            term("weights", "{} numbers x {} bytes", part if stage == 3 else numbers, c),
            term("fp32 weights", "{} numbers of this rank's part x {} bytes", part, 4, host=host),
            term("Adam moments", "{} moments x {} numbers of this rank's part x {} bytes", 2, part, 4, host=host),
        ]
        if self._bf16_optimizer:
            found.append(term("gradients", "{} fp32 numbers x {} bytes", numbers, 4))
        if stage == 3:
            found += [
                term("gradients", "{} fp32 numbers of this rank's part x {} bytes", part, 4, host=host),
                term("gradient bucket", "{} fp32 numbers x {} bytes", self._bucket, 4),
                term("gathered weights", "{} numbers of small parameters x {} bytes", self._spread(small=True), c),
            ]
        return [*found, *self._offloaded()] if host else found

    def _offloaded(self) -> list[Term]:
        """List the buffers that move gradients to the host and weights back."""
        c, part, one = self.sizes.number, self.parameters.part, self.parameters.largest
        found = [term("gradients on the host", "{} fp32 numbers of this rank's part x {} bytes", part, 4, host=True)]
        if self._stage == 3:
            return found
        return [
            *found,
            term("weights on their way", "{} numbers of this rank's part x {} bytes", part, c, host=True),
            term("gradients on their way", "{} numbers of a parameter x {} bytes", one, c),
            term("gradients on the host", "{} numbers of a parameter x {} bytes", one, c, host=True),
        ]

    def gathered(self, phase: Phase) -> list[Term]:
        """List the weights that ZeRO-3 gathers for a forward and backward pass."""
        if self._stage < 3 or phase in (Phase.backward_end, Phase.step):
            return []
        numbers, c = self._spread(small=False), self.sizes.number
        live = min(numbers, _LIVE + self.parameters.layer)
        found = [term("gathered weights", "{} numbers of large parameters x {} bytes", live, c)]
        if phase is Phase.first_layer:
            fetched = min(numbers, _FETCHED + self.parameters.layer)
            found.append(term("gathered weights", "{} numbers on their way x {} bytes", fetched, c))
        return found

    def gradients(self, phase: Phase, progress: GradientProgress = START) -> list[Term]:
        """List the tensors of gradients at a moment of the last micro-batch of a step."""
        if phase in (Phase.first_layer, Phase.forward):
            return self._between()
        if phase is Phase.backward:
            return self._during(progress)
        return self._at_end() if phase is Phase.backward_end else self._in_step()

    def gradients_of_chunks(self) -> list[Term]:
        """List the buffers that add up the gradients of a layer's chunks (engine/moe/overlap.py): the sum in fp32, and
        one chunk's."""
        if self.sizes.chunks == 1:
            return []
        each = 8 if self.sizes.number == 2 else 4
        return [
            term(
                "gradients of chunks", "{} numbers of a layer's experts x {} bytes", self.parameters.layer_experts, each
            )
        ]

    def gradients_of_embeddings(self) -> list[Term]:
        """Return the gradients that the loss gave the embeddings and that wait for those of the input."""
        if self._stage < 2:
            return []  # among those that are done
        return [term("gradients of embeddings", "{} numbers x {} bytes", self.parameters.embedding, self.sizes.number)]

    def _between(self) -> list[Term]:
        """List the gradients that earlier micro-batches of the step leave."""
        if self.sizes.config.train.accumulation == 1:
            return []
        return self._kept()

    def _kept(self) -> list[Term]:
        """List the gradients that stay until the optimizer step."""
        numbers, c = self.parameters.numbers, self.sizes.number
        if self._stage < 2:
            found = [term("gradients", "{} numbers x {} bytes", numbers, c)]
            plain = self._stage == 0 or self._bf16_optimizer
            return found if plain else [*found, self._bucket_term()]
        if self._stage == 2 and self.sizes.config.train.offload:
            touched = sum(group.touched for group in self.parameters.groups)
            return [
                term(
                    "gradients on the host",
                    "{} numbers of parameters in this rank's part x {} bytes",
                    touched,
                    c,
                    host=True,
                )
            ]
        return self._own() if self._stage == 2 else []

    def _own(self) -> list[Term]:
        """List the gradients of this rank's part at ZeRO-1 and 2; in fp32 of whole parameters."""
        if self.sizes.config.train.offload and self.sizes.number == 4:
            return []
        if self.sizes.number == 2:
            return [term("gradients", "{} fp32 numbers of this rank's part x {} bytes", self.parameters.part, 4)]
        touched = sum(group.touched for group in self.parameters.groups)
        return [term("gradients", "{} numbers of parameters in this rank's part x {} bytes", touched, 4)]

    def _during(self, progress: GradientProgress) -> list[Term]:
        c, before = self.sizes.number, self._between()
        new = term("gradients", "{} numbers just made x {} bytes", progress.new, c)
        if self._stage < 2:
            if before:
                return [*before, new]
            done = term("gradients", "{} numbers x {} bytes", progress.done, c)
            plain = self._stage == 0 or self._bf16_optimizer
            return [done, new] if plain else [done, new, self._bucket_term()]
        if self._stage == 2:
            return [*before, new, self._bucket_term()]
        # experts and others are added up in turn, experts after their layer
        if self.sizes.shared_out and progress.new == 0:
            return [new, *self._added_up(self.parameters.layer_experts)]
        return [new]

    def _at_end(self) -> list[Term]:
        c, numbers = self.sizes.number, self.parameters.numbers
        largest_group = max(group.numbers for group in self.parameters.groups)
        copy = [term("gradients added up", "{} numbers x {} bytes", largest_group, 4)]
        if self._stage == 0:
            return [term("gradients", "{} numbers x {} bytes", numbers, c), *copy]
        if self._bf16_optimizer:
            one = term("gradients added up", "{} fp32 numbers of a parameter x {} bytes", self.parameters.largest, 4)
            return [term("gradients", "{} numbers x {} bytes", numbers, c), one]
        if self._stage == 3:
            return self._added_up(largest_group)
        bucket = self._bucket_term()
        if c == 2:
            half = 0 if self._stage == 1 else largest_group
            return [bucket, *self._own(), term("gradients added up", "{} numbers x {} bytes", half, 2), *copy]
        if self._stage == 1:
            apart = [term("gradients", "{} numbers x {} bytes", numbers, c), bucket]
            return largest(apart, [bucket, *copy], [bucket, *self._own()])
        return [bucket, *self._between(), *largest(copy, self._own())]

    def _in_step(self) -> list[Term]:
        c, part = self.sizes.number, max(group.part for group in self.parameters.groups)
        copy = [term("gradients in the step", "{} numbers of this rank's part x {} bytes", part, 4)]
        if self._stage == 0:
            return [term("gradients", "{} numbers x {} bytes", self.parameters.numbers, c)]
        if self._stage == 3:
            return [] if self.sizes.config.train.offload else copy
        if self._bf16_optimizer:
            return [term("gradients", "{} numbers x {} bytes", self.parameters.numbers, c), *self._gathering()]
        piece = min(self.parameters.largest, part)
        norm = [term("gradients in the step", "{} fp64 numbers for the norm x {} bytes", piece, 8)]
        if c == 2:
            return largest([*self._own(), *norm], self._gathering())
        if self.sizes.config.train.offload:
            return self._gathering()
        return largest([*self._own(), *largest(copy, norm)], self._gathering())

    def _gathering(self) -> list[Term]:
        """List the copy of the weights that gloo gathers after the update."""
        groups = [group.numbers for group in self.parameters.groups if group.ranks > 1]
        numbers = 0 if self.sizes.gpu else max(groups, default=0)
        return [term("weights on their way", "{} numbers x {} bytes", numbers, self.sizes.number)]

    def _added_up(self, numbers: int) -> list[Term]:
        """List the gradients that ZeRO-3 adds up over the ranks at once."""
        copies = 1 if self.sizes.gpu else 2
        return [term("gradients added up", "{} copies x {} fp32 numbers x {} bytes", copies, numbers, 4)]

    @property
    def _stage(self) -> int:
        return self.sizes.config.train.zero_stage

    @property
    def _bf16_optimizer(self) -> bool:
        """Whether DeepSpeed uses its BF16_Optimizer, which keeps all gradients in fp32."""
        bf16 = self.sizes.number == 2
        return self._stage == 1 and bf16 and not self.sizes.config.train.offload

    @property
    def _bucket(self) -> int:
        return min(self.parameters.numbers, MAX_BUCKET)

    def _bucket_term(self) -> Term:
        each = 4 if self._stage == 1 else self.sizes.number
        return term("gradient bucket", "{} numbers x {} bytes", self._bucket, each)

    def _spread(self, *, small: bool) -> int:
        """Count the numbers of parameters that ZeRO-3 cuts up over ranks: those that stay gathered, or the others."""
        return sum(
            numel
            for group in self.parameters.groups
            for numel in group.numels
            if group.ranks > 1 and (numel <= KEPT_WHOLE) == small
        )
