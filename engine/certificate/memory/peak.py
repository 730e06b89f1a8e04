"""The memory part of a certificate: the most bytes of tensors that a rank holds, and whether a device has them.

Memory can be greatest at these moments of a step: the first layer and the end of the forward pass; backward at the
loss, in the experts and the attention of the last and of the first layer, and at its end; the optimizer step. Each
moment is a list of terms, bytes with their formula. The greatest sum is the peak. Counts of rows are the exact maxima
over the certified steps, micro-batches, layers and ranks, so no rank needs more than this for them.

Only tensors are counted. The libraries' own memory (a CUDA context and NCCL's buffers, or the interpreter's and gloo's)
and memory that an allocator cannot reuse are left out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from foreroute.engine.certificate.counts.exact import Certificate
from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.table_rows import OfTable
from foreroute.engine.certificate.memory.activations import Activations
from foreroute.engine.certificate.memory.sizes import (
    Parameters,
    Rows,
    Sizes,
    bounded_rows,
    count_parameters,
    exact_rows,
    runs_on_gpu,
)
from foreroute.engine.certificate.memory.state import START, GradientProgress, Phase, State
from foreroute.engine.certificate.memory.table_memory import TableMemory
from foreroute.engine.certificate.memory.terms import Term, merged, term, total
from foreroute.engine.errors import require


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a run fits into a device."""

    device_bytes: int
    fits: bool
    headroom_bytes: int  # negative: what is missing
    largest_streams: int  # of a rank in a micro-batch, that fit; 0: not even one


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of tensors of the rank that needs the most, when it does."""

    peak_bytes: int  # of the device's memory
    host_bytes: int  # held in the host's memory (train.offload)
    when: str
    k: int  # active experts of the steps in which this occurs
    streams: int  # of a rank in a micro-batch
    gpu: bool  # counted for a GPU and the Triton kernels, otherwise for a CPU
    terms: tuple[Term, ...]  # those of the peak
    moments: dict[str, int]  # bytes at each moment looked at, at that k
    verdict: Verdict | None  # None: no device was named
    uncounted_k: tuple[int, ...] = ()  # of the run, if no step of that k was counted


def peak_memory(
    layout: Layout, found: Certificate, vocab_size: int, *, device_memory_bytes: int | None = None
) -> Memory:
    """Predict the memory of a certified run, and judge it.

    Args:
        layout: as certified.
        device_memory_bytes: of a rank's device; None: no verdict. With one, kernels.backend=auto means a GPU.

    Raises:
        UserError: device_memory_bytes is below 1.
    """
    require(
        device_memory_bytes is None or device_memory_bytes > 0,
        f"device memory of {device_memory_bytes} bytes: must be above 0",
    )
    gpu = runs_on_gpu(layout.config.kernels.backend, device_memory_bytes)
    memory = peak_memory_at(layout, found, vocab_size, gpu=gpu)
    ks = {layout.k(step) for step in range(layout.config.train.steps)} - {of_k.k for of_k in found.by_k}
    memory = replace(memory, uncounted_k=tuple(sorted(ks)))
    if device_memory_bytes is None:
        return memory

    def fits(streams: int) -> bool:
        other = peak_memory_at(layout, found, vocab_size, gpu=gpu, streams=streams)
        return other.peak_bytes <= device_memory_bytes

    headroom = device_memory_bytes - memory.peak_bytes
    verdict = Verdict(device_memory_bytes, headroom >= 0, headroom, largest_number(fits))
    return replace(memory, verdict=verdict)


def peak_memory_at(
    layout: Layout, found: Certificate, vocab_size: int, *, gpu: bool, streams: int | None = None
) -> Memory:
    """Predict the memory of a certified run at another number of streams of a rank in a micro-batch.

    Rows are known at the certified number b0 only. At b they are taken as at most ceil(b / b0) times as many, and never
    more than if all tokens of the expert group chose the same rank's experts. For b below b0 that is never too little.
    Above b0 it is so for multiples of b0 that share out the same streams of a step in fewer micro-batches
    (train.accumulation); with more data.streams the text is cut elsewhere, and then it is an assumption.

    Args:
        gpu: count for a GPU and the Triton kernels, otherwise for a CPU.
        streams: None for the certified number.
    """
    known_streams, parameters = layout.streams, count_parameters(layout, vocab_size)
    candidates = []
    for of_k in found.by_k:
        assert of_k.k is not None
        sizes = Sizes(layout, vocab_size, known_streams, of_k.k, gpu)
        rows = exact_rows(of_k, sizes)
        if streams is not None:
            sizes = replace(sizes, streams=streams)
            rows = bounded_rows(rows, sizes, known_streams)
        candidates.append(
            _peak(sizes, rows, parameters, TableMemory(sizes, found.tables.tables if found.tables else ()))
        )
    return max(candidates, key=lambda memory: memory.peak_bytes)


def memory_of_rows(
    layout: Layout, vocab_size: int, k: int, rows: Rows, *, gpu: bool, tables: Sequence[OfTable] = ()
) -> Memory:
    """Predict the memory of a rank that has these rows in a step, at k active experts.

    Args:
        tables: n-gram tables with the rank's rows.
        gpu: count for a GPU and the Triton kernels, otherwise for a CPU.
    """
    sizes = Sizes(layout, vocab_size, layout.streams, k, gpu)
    return _peak(sizes, rows, count_parameters(layout, vocab_size), TableMemory(sizes, tables))


def largest_number(fits: Callable[[int], bool], first: int = 1) -> int:
    """Return the largest number for which `fits` is true, 0 if it is false for 1; above it `fits` must be false.

    Begins at `first` and doubles or halves; asks about no number twice.
    """
    low, high = 0, first
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _peak(sizes: Sizes, rows: Rows, parameters: Parameters, tables: TableMemory) -> Memory:
    moments = {name: merged(terms) for name, terms in _moments(sizes, rows, parameters, tables)}
    # a CPU's device is the host
    needed = {name: total(terms, host=False if sizes.gpu else None) for name, terms in moments.items()}
    when = max(needed, key=lambda name: needed[name])
    return Memory(
        peak_bytes=needed[when],
        host_bytes=total(moments[when], host=True),
        when=when,
        k=sizes.k,
        streams=sizes.streams,
        gpu=sizes.gpu,
        terms=moments[when],
        moments=needed,
        verdict=None,
    )


def _moments(sizes: Sizes, rows: Rows, parameters: Parameters, tables: TableMemory) -> Iterator[tuple[str, list[Term]]]:
    """Yield the terms of every moment at which memory can be greatest."""
    state, activations = State(sizes, parameters), Activations(sizes, rows)
    layers = sizes.config.model.layers
    with_experts = sizes.layout.blocks_with_experts
    always = [*state.held(), *_plans(sizes, rows), *tables.held()]

    def moment(phase: Phase, progress: GradientProgress = START) -> list[Term]:
        gradients = state.gradients(phase, progress)
        running = phase in (Phase.forward, Phase.backward)
        if phase is Phase.backward and sizes.output_layers:
            gradients += state.gradients_of_embeddings()
        kept = tables.entries() if running else []
        own = [*tables.moment(phase), *kept]
        return [*always, *state.gathered(phase), *gradients, *activations.memory(new=running), *own]

    yield Phase.first_layer.value, moment(Phase.first_layer)
    kept = activations.kept(layers)
    for name, phase in (("forward, end", Phase.forward), ("backward, loss", Phase.forward)):
        logits = activations.logits(backward=name.startswith("backward"))
        yield name, [*moment(phase), *kept, *activations.ends(), *logits]
    looked_at = {layers: "last", 1: "first"}
    for place, name in ((-1, "last"), (0, "first")) if with_experts else ():
        looked_at.setdefault(with_experts[place] + 1, f"{name} expert")
    for number, name in looked_at.items():
        done, inner = parameters.head + sum(parameters.blocks[number:]), parameters.inner[number - 1]
        has_experts = number - 1 in with_experts
        yield (
            f"backward, {'experts' if has_experts else 'feed-forward'} of the {name} layer",
            [
                *moment(Phase.backward, GradientProgress(done, inner)),
                *activations.ends(),
                *activations.kept(number),
                *(activations.experts_backward() if has_experts else activations.feed_forward_backward(number - 1)),
                *(state.gradients_of_chunks() if has_experts else []),
            ],
        )
        yield (
            f"backward, attention of the {name} layer",
            [
                *moment(Phase.backward, GradientProgress(done + inner)),
                *activations.ends(),
                *activations.kept(number, attention_only=True),
                *activations.attention_backward(),
            ],
        )
    if sizes.output_layers:
        progress = GradientProgress(parameters.numbers - parameters.at_input, parameters.embedding)
        yield "backward, embedding", [*moment(Phase.backward, progress), *activations.ends()]
    if parameters.at_input:
        progress = GradientProgress(parameters.numbers - parameters.at_input, parameters.at_input)
        yield ("backward, tables at the input", [*moment(Phase.backward, progress), *activations.ends()])
    yield Phase.backward_end.value, moment(Phase.backward_end)
    yield Phase.step.value, moment(Phase.step)


def _plans(sizes: Sizes, rows: Rows) -> list[Term]:
    """Plans of this micro-batch and of those planned ahead: indices of 8 bytes and weights of 4, or the sets that a
    gate weighs."""
    if not sizes.layout.expert_layers:
        return []
    config, tokens = sizes.config, sizes.tokens
    ahead = config.data.prefetch * config.train.accumulation + 1
    found = [f"{rows.computed} expert rows x {24 if sizes.gate else 20} bytes", f"{rows.received} rows x 8 bytes"]
    more_columns = config.moe.columns - config.moe.experts
    if sizes.gate:
        listed = rows.received + (tokens if more_columns else 0)
        found.append(f"{listed} rows x {sizes.listed} experts of a set x 8 bytes")
    elif more_columns:
        found.append(f"{tokens} tokens x {more_columns} experts without rows x 4 bytes")
    if sizes.shared_out and not sizes.gather:
        found.append(f"{tokens * min(sizes.placement.expert_ranks, sizes.listed)} rows to send x 16 bytes")
        found.append(f"{rows.received + tokens} received rows and tokens x 8 bytes")
    return [term("plans", f"{ahead} plans x {config.num_tables} tables x {formula}") for formula in found]
