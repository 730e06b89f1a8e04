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
                term("weights", f"{numbers} numbers x {c} bytes"),
                term("Adam moments", f"2 moments x {numbers} numbers x 4 bytes"),
            ]
        found = [
            term("weights", f"{part if stage == 3 else numbers} numbers x {c} bytes"),
            term("fp32 weights", f"{part} numbers of this rank's part x 4 bytes", host=host),
            term("Adam moments", f"2 moments x {part} numbers of this rank's part x 4 bytes", host=host),
        ]
        if self._bf16_optimizer:
            found.append(term("gradients", f"{numbers} fp32 numbers x 4 bytes"))
        if stage == 3:
            found += [
                term("gradients", f"{part} fp32 numbers of this rank's part x 4 bytes", host=host),
                term("gradient bucket", f"{self._bucket} fp32 numbers x 4 bytes"),
                term("gathered weights", f"{self._spread(small=True)} numbers of small parameters x {c} bytes"),
            ]
        return [*found, *self._offloaded()] if host else found

    def _offloaded(self) -> list[Term]:
        """List the buffers that move gradients to the host and weights back."""
        c, part, one = self.sizes.number, self.parameters.part, self.parameters.largest
        found = [term("gradients on the host", f"{part} fp32 numbers of this rank's part x 4 bytes", host=True)]
        if self._stage == 3:
            return found
        return [
            *found,
            term("weights on their way", f"{part} numbers of this rank's part x {c} bytes", host=True),
            term("gradients on their way", f"{one} numbers of a parameter x {c} bytes"),
            term("gradients on the host", f"{one} numbers of a parameter x {c} bytes", host=True),
        ]

    def gathered(self, phase: Phase) -> list[Term]:
        """List the weights that ZeRO-3 gathers for a forward and backward pass."""
        if self._stage < 3 or phase in (Phase.backward_end, Phase.step):
            return []
        numbers, c = self._spread(small=False), self.sizes.number
        live = min(numbers, _LIVE + self.parameters.layer)
        found = [term("gathered weights", f"{live} numbers of large parameters x {c} bytes")]
        if phase is Phase.first_layer:
            fetched = min(numbers, _FETCHED + self.parameters.layer)
            found.append(term("gathered weights", f"{fetched} numbers on their way x {c} bytes"))
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
            term("gradients of chunks", f"{self.parameters.layer_experts} numbers of a layer's experts x {each} bytes")
        ]

    def gradients_of_embeddings(self) -> list[Term]:
        """Return the gradients that the loss gave the embeddings and that wait for those of the input."""
        if self._stage < 2:
            return []  # among those that are done
        return [term("gradients of embeddings", f"{self.parameters.embedding} numbers x {self.sizes.number} bytes")]

    def _between(self) -> list[Term]:
        """List the gradients that earlier micro-batches of the step leave until the optimizer step."""
        if self.sizes.config.train.accumulation == 1:
            return []
        numbers, c = self.parameters.numbers, self.sizes.number
        if self._stage < 2:
            found = [term("gradients", f"{numbers} numbers x {c} bytes")]
            plain = self._stage == 0 or self._bf16_optimizer
            return found if plain else [*found, self._bucket_term()]
        if self._stage == 2 and self.sizes.config.train.offload:
            formula = f"{self.parameters.touched} numbers of parameters in this rank's part x {c} bytes"
            return [term("gradients on the host", formula, host=True)]
        return self._own() if self._stage == 2 else []

    def _own(self) -> list[Term]:
        """List the gradients of this rank's part at ZeRO-1 and 2; in fp32 of whole parameters."""
        if self.sizes.config.train.offload and self.sizes.number == 4:
            return []
        if self.sizes.number == 2:
            return [term("gradients", f"{self.parameters.part} fp32 numbers of this rank's part x 4 bytes")]
        return [term("gradients", f"{self.parameters.touched} numbers of parameters in this rank's part x 4 bytes")]

    def _during(self, progress: GradientProgress) -> list[Term]:
        c, before = self.sizes.number, self._between()
        new = term("gradients", f"{progress.new} numbers just made x {c} bytes")
        if self._stage < 2:
            if before:
                return [*before, new]
            done = term("gradients", f"{progress.done} numbers x {c} bytes")
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
        copy = [term("gradients added up", f"{largest_group} numbers x 4 bytes")]
        if self._stage == 0:
            return [term("gradients", f"{numbers} numbers x {c} bytes"), *copy]
        if self._bf16_optimizer:
            one = term("gradients added up", f"{self.parameters.largest} fp32 numbers of a parameter x 4 bytes")
            return [term("gradients", f"{numbers} numbers x {c} bytes"), one]
        if self._stage == 3:
            return self._added_up(largest_group)
        bucket = self._bucket_term()
        if c == 2:
            half = 0 if self._stage == 1 else largest_group
            return [bucket, *self._own(), term("gradients added up", f"{half} numbers x 2 bytes"), *copy]
        if self._stage == 1:
            apart = [term("gradients", f"{numbers} numbers x {c} bytes"), bucket]
            return largest(apart, [bucket, *copy], [bucket, *self._own()])
        return [bucket, *self._between(), *largest(copy, self._own())]

    def _in_step(self) -> list[Term]:
        c, part = self.sizes.number, max(group.part for group in self.parameters.groups)
        copy = [term("gradients in the step", f"{part} numbers of this rank's part x 4 bytes")]
        if self._stage == 0:
            return [term("gradients", f"{self.parameters.numbers} numbers x {c} bytes")]
        if self._stage == 3:
            return [] if self.sizes.config.train.offload else copy
        if self._bf16_optimizer:
            return [term("gradients", f"{self.parameters.numbers} numbers x {c} bytes"), *self._gathering()]
        piece = min(self.parameters.largest, part)
        norm = [term("gradients in the step", f"{piece} fp64 numbers for the norm x 8 bytes")]
        if c == 2:
            return largest([*self._own(), *norm], self._gathering())
        if self.sizes.config.train.offload:
            return self._gathering()
        return largest([*self._own(), *largest(copy, norm)], self._gathering())

    def _gathering(self) -> list[Term]:
        """List the copy of the weights that gloo gathers after the update."""
        groups = [group.numbers for group in self.parameters.groups if group.ranks > 1]
        numbers = 0 if self.sizes.gpu else max(groups, default=0)
        return [term("weights on their way", f"{numbers} numbers x {self.sizes.number} bytes")]

    def _added_up(self, numbers: int) -> list[Term]:
        """List the gradients that ZeRO-3 adds up over the ranks at once."""
        copies = 1 if self.sizes.gpu else 2
        return [term("gradients added up", f"{copies} copies x {numbers} fp32 numbers x 4 bytes")]

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
        return term("gradient bucket", f"{self._bucket} numbers x {each} bytes")

    def _spread(self, *, small: bool) -> int:
        """Count the numbers of parameters that ZeRO-3 cuts up over ranks: those that stay gathered, or the others."""
        return sum(
            numel
            for group in self.parameters.groups
            for numel in group.numels
            if group.ranks > 1 and (numel <= KEPT_WHOLE) == small
        )
