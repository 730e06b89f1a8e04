"""A run laid out on its ranks: the sizes that all of its steps share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.config import Config, Keys, Precision, WireFormat
from foreroute.engine.config.model import expert_layers
from foreroute.engine.data.documents import NO_STARTS, Starts
from foreroute.engine.data.streams import Streams
from foreroute.engine.data.tokens.vocab import Ids
from foreroute.engine.errors import require
from foreroute.engine.parallel.mesh import Mesh
from foreroute.engine.routing.k_schedule import active_experts
from foreroute.engine.routing.methods import planned_method
from foreroute.engine.routing.plans.exchange_choice import gathers, wire_itemsize


class Trips(NamedTuple):
    """How often in a step rows go to experts, and results come back (or gradients, which weigh as much)."""

    to_experts: int
    to_tokens: int


FORWARD = Trips(1, 1)


@dataclass(frozen=True, slots=True)
class Layout:
    """A run and the ranks that it runs on."""

    config: Config
    placement: Placement = field(default_factory=Placement)

    @property
    def streams(self) -> int:
        """Streams of a rank in a micro-batch."""
        return self.config.streams_per_micro_batch(self.placement.world_size)

    @property
    def tokens(self) -> int:
        """Tokens of a rank in a micro-batch."""
        return self.streams * self.config.data.segment

    @property
    def local_experts(self) -> int:
        """Experts of a rank, in the layer that has the most."""
        return max(self.experts_y, default=0) // self.placement.expert_ranks

    @property
    def blocks_with_experts(self) -> Sequence[int]:
        """The numbers of the blocks that have experts; none in a dense run."""
        return () if self.config.moe.dense else expert_layers(self.config.model, self.config.moe)

    @property
    def expert_layers(self) -> int:
        """Expert layers; each stratum is one."""
        return len(self.blocks_with_experts) * self.config.moe.strata

    @property
    def experts_y(self) -> list[int]:
        """Experts of each expert layer."""
        return [] if self.config.moe.dense else [section.experts for section in self.config.expert_sections]

    @property
    def item_bytes(self) -> int:
        """Bytes of a number of the model's compute copy and of activations."""
        return 2 if self.config.train.precision is Precision.bf16 else 4

    @property
    def row_bytes(self) -> int:
        """Bytes of one row between ranks."""
        return self.config.model.width * wire_itemsize(self.config.parallel, self.config.train.precision)

    @property
    def table_row_bytes(self) -> int:
        """Bytes of a row of an n-gram table between ranks."""
        tables = self.config.ngram_tables
        return tables.width * (2 if tables.wire is WireFormat.bf16 else 4)

    @property
    def trips(self) -> Trips:
        """Trips of a layer's rows in one micro-batch: forward, backward, and what recomputation repeats.

        Recomputation ends as soon as everything that backward needs is there again. Results do not come back once more
        where nothing after them is kept for backward. A layer in chunks (engine/moe/overlap.py) repeats everything.
        """
        if not self.config.train.recompute:
            return Trips(2, 2)
        model, moe = self.config.model, self.config.moe
        kept_after = not model.pre_norm or model.dropout > 0 or moe.shared_width > 0
        kept_after = kept_after or moe.constant_experts + moe.copy_experts > 0
        return Trips(3, 3 if kept_after or min(self.config.parallel.chunks, self.tokens) > 1 else 2)

    @property
    def layer_trips(self) -> list[Trips]:
        """Trips of each layer's rows: `trips`, but results of a stratum come back for the norm of the next one."""
        strata, trips = self.config.moe.strata, self.trips
        before = Trips(trips.to_experts, trips.to_experts)
        return [trips if (y + 1) % strata == 0 else before for y in range(self.expert_layers)]

    def gathers(self, k: int, tokens: int | None = None) -> bool:
        """Return whether all rows go to all ranks at this k.

        Args:
            tokens: of a rank in a micro-batch; None for the run's.
        """
        config, tokens = self.config, self.tokens if tokens is None else tokens
        return gathers(
            config.parallel,
            config.moe,
            config.model.width,
            config.train.precision,
            ranks=self.placement.expert_ranks,
            k=k,
            tokens=tokens,
        )

    def exchange(self, k: int) -> str:
        """Return the exchange that the run uses at this k: tokens, gather, or local (one rank: nothing moves)."""
        if self.placement.expert_ranks == 1:
            return "local"
        return "gather" if self.gathers(k) else "tokens"

    def mesh(self, rank: int) -> Mesh:
        """Return the place of a rank."""
        return Mesh(rank, self.placement.world_size, self.placement.expert_ranks)

    def k(self, step: int) -> int:
        """Return the active experts of a step; of a dense run the same at all steps, since nothing depends on it."""
        if self.config.moe.dense:
            return self.config.schedule.k_max
        return active_experts(self.config.schedule, step, self.config.schedule_steps)

    def read(self, ids: Ids, document_starts: Starts = NO_STARTS) -> Streams:
        """Lay the training split out in streams."""
        data = self.config.data
        return Streams(ids, data.streams, data.segment, self.config.context, data.start, document_starts)

    def counted_steps(self, steps: int | None = None, sample: int = 1) -> range:
        """Return the steps that a certificate counts.

        Args:
            steps: count the first so many; None for train.steps.
            sample: count every so manieth only.

        Raises:
            UserError: steps or sample is out of range.
        """
        last = self.config.train.steps
        steps = last if steps is None else steps
        require(1 <= steps <= last, f"steps={steps}: must be from 1 to train.steps={last}")
        require(1 <= sample <= steps, f"sample={sample}: must be from 1 to the {steps} steps to certify")
        return range(0, steps, sample)

    def check(self) -> None:
        """Refuse a run that cannot be certified on these ranks.

        Raises:
            UserError: experts or streams cannot be shared out evenly, or routes are not known before the run.
        """
        moe = self.config.moe
        nothing = moe.dense and not self.config.ngram_tables.places
        words = "moe.router=dense without n-gram tables that ranks share out: no rows travel, nothing to certify"
        require(not nothing, words)
        for section in [] if moe.dense else self.config.expert_sections:
            planned = planned_method(section)
            why = "routes are drawn at each forward pass and not replayed"
            if planned is None:
                why = "routes depend on hidden states, so rows and bytes are not known before the run"
            require(
                planned is not None and (planned.of_ids or planned.of_places),
                f"moe.router={section.router}: {why}; only routers that follow from the ids, such as hashed, can be"
                " certified",
            )
        require(
            moe.keys is Keys.own,
            f"moe.keys={moe.keys.name}: routes are drawn at each forward pass and not replayed; only own can be"
            " certified",
        )
        for experts in self.experts_y:
            Mesh(0, self.placement.world_size, self.placement.expert_ranks).local_experts(experts)
        self.config.streams_per_micro_batch(self.placement.world_size)
