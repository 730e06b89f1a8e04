"""The time model against sums worked out by hand and the model's own parameters; it times nothing."""

from dataclasses import replace

import numpy as np
import pytest

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.counts.placement import Placement
from foreroute.engine.certificate.counts.replay import StepCounts
from foreroute.engine.certificate.time.cluster import ClusterConfig, LinkConfig, ScaleConfig, SharingConfig
from foreroute.engine.certificate.time.step_time import StepModel, layer_times
from foreroute.engine.certificate.time.table_time import table_seconds
from foreroute.engine.config import (
    Config,
    DataConfig,
    EvalConfig,
    KernelsConfig,
    ModelConfig,
    MoEConfig,
    NgramTablesConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
    WireFormat,
)
from foreroute.engine.config.enums import ExchangeKind
from foreroute.engine.errors import UserError
from foreroute.engine.model.build import build_model

VOCAB, WIDTH = 11, 16
# One product takes 1 us whatever its size, elementwise work and starts take nothing: easy sums.
PLAIN = ClusterConfig(
    ranks_per_node=2,
    product_fp32=[[1000.0, 1e6]],
    memory_gb_per_s=1e12,
    operation_us=0.0,
    inside=LinkConfig(gb_per_s=1e-3, message_us=100.0),  # a million bytes a second
    between=LinkConfig(gb_per_s=0.5e-3, message_us=500.0),
)


def config(**sections: object) -> Config:
    base = Config(
        data=DataConfig(streams=4, segment=8),
        model=ModelConfig(2, WIDTH, heads=2, head_width=8, memory=8, dropout=0.0),
        moe=MoEConfig(experts=4, expert_width=12, ngram=1, rows=16),
        schedule=ScheduleConfig(k_min=2, k_max=2),
        train=TrainConfig(steps=10, zero_stage=1),
        eval=EvalConfig(k=[1]),
        kernels=KernelsConfig(masked_from_k=5),
    )
    return replace(base, **sections)


def counts(sent_PP: list[list[int]], count_E: list[int]) -> StepCounts:
    """One step, layer, micro-batch and expert group."""
    sent = np.array(sent_PP)[None, None, None]
    return StepCounts(np.array([0]), 2, sent, sent, np.array(count_E)[None, None, None])


def test_products_take_what_the_curve_says() -> None:
    cluster = ClusterConfig(product_fp32=[[1.0, 0.5], [100.0, 2.0]], product_bf16=[[1.0, 4.0]])
    seconds = cluster.product_seconds(np.array([1e9, 10e9, 100e9, 1e12]), bf16=False)
    # 10 GFLOP is half way between 1 and 100 on the logarithmic scale: 1.25 TFLOP/s
    np.testing.assert_allclose(seconds, [2e-3, 8e-3, 0.05, 0.5])
    assert cluster.product_seconds(1.0, bf16=False) == pytest.approx(2e-3)  # never below the first
    assert cluster.product_seconds(8e9, bf16=True) == pytest.approx(2e-3)


def test_rows_inside_a_node_leave_through_the_ports_of_their_ranks() -> None:
    cfg = config()
    step = counts([[10, 4], [6, 9]], [20, 10, 15, 5])
    found = layer_times(Layout(cfg, Placement(2, 2, 2)), PLAIN, step)
    # The busier direction carries 6 rows of 64 bytes; one message; twice to experts and twice back.
    assert found.exchange == pytest.approx(4 * (100e-6 + 6 * 64 / 1e6))
    assert found.hidden == 0.0
    # 3 passes x 2 matrices x 1 us: one launch computes all experts on a GPU, on a CPU each is a product of its own
    assert found.experts == pytest.approx(6e-6)
    on_cpu = layer_times(Layout(cfg, Placement(2, 2, 2)), replace(PLAIN, host_copies=True), step)
    assert on_cpu.experts == pytest.approx(12e-6)


def test_rows_between_nodes_share_the_link_of_their_node() -> None:
    cfg = config(data=DataConfig(streams=8, segment=8))
    sent = [[9, 1, 2, 3], [1, 9, 4, 5], [6, 0, 9, 1], [0, 0, 1, 9]]
    step = counts(sent, [9, 9, 9, 9])
    found = layer_times(Layout(cfg, Placement(4, 4, 2)), PLAIN, step)
    # Node 0 sends 2 + 3 + 4 + 5 rows to node 1: 14 x 64 bytes at 0.5 MB/s, more than any port (10 rows at 1 MB/s); 3
    # messages.
    assert found.exchange == pytest.approx(4 * (3 * 500e-6 + 14 * 64 / 0.5e6))
    narrow = replace(PLAIN, inside=LinkConfig(gb_per_s=0.2e-3, message_us=100.0))
    slower = layer_times(Layout(cfg, Placement(4, 4, 2)), narrow, step)
    # rank 1 sends 10 rows at 0.2 MB/s
    assert slower.exchange == pytest.approx(4 * (3 * 500e-6 + 10 * 64 / 0.2e6))


def test_rows_of_tables_leave_as_those_of_experts_and_are_changed() -> None:
    tables = NgramTablesConfig(rows=50, orders=[2], heads=2, width=4, layers=[0, 1])
    cfg = config(data=DataConfig(streams=8, segment=8), ngram_tables=tables)
    landed = [30.0, 10.0]
    # One way: 2 tables x 3 messages; node 0 reads 80 rows of 16 bytes, half of them of the other node, at 0.5 MB/s.
    across = table_seconds(Layout(cfg, Placement(4, 4, 2)), PLAIN, landed)
    assert across == pytest.approx(2 * (2 * 3 * 500e-6 + 40 * 16 / 0.5e6))
    inside = table_seconds(Layout(cfg, Placement(4, 4, 4)), PLAIN, landed)  # 3 of 4 rows of 40, through a port
    assert inside == pytest.approx(2 * (2 * 3 * 100e-6 + 30 * 16 / 1e6))
    half = replace(cfg, ngram_tables=replace(tables, wire=WireFormat.bf16))
    found = table_seconds(Layout(half, Placement(4, 4, 4)), PLAIN, landed)
    assert found == pytest.approx(2 * (2 * 3 * 100e-6 + 30 * 8 / 1e6))
    # Alone, nothing moves; 40 rows of 16 bytes in 16 passes, and what 64 tokens read, 2 tables x 2 heads, in 6.
    memory = replace(PLAIN, memory_gb_per_s=1e-3, operation_us=1.0)
    alone = table_seconds(Layout(cfg, Placement(1, 1, 1)), memory, landed)
    assert alone == pytest.approx(16 * (16 * 40 + 6 * 64 * 4) / 1e6 + 2 * 30 * 1e-6)


def test_the_slowest_group_counts_with_its_busiest_rank() -> None:
    cfg = config()
    sent = np.array([[[5, 1], [1, 5]], [[5, 7], [2, 5]]])[None, None]
    count = np.array([[3, 3, 3, 3], [9, 9, 1, 1]])[None, None]
    step = StepCounts(np.array([0]), 2, sent, sent, count)
    found = layer_times(Layout(cfg, Placement(4, 2, 4)), PLAIN, step)
    assert found.exchange == pytest.approx(4 * (100e-6 + 7 * 64 / 1e6))


def test_gather_sends_all_tokens_to_all() -> None:
    cfg = config(parallel=ParallelConfig(expert_ranks=2, exchange=ExchangeKind.gather))
    found = layer_times(Layout(cfg, Placement(2, 2, 2)), PLAIN, counts([[1, 0], [0, 1]], [1, 0, 1, 0]))
    assert found.exchange == pytest.approx(4 * (100e-6 + 16 * 64 / 1e6))


@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_gather_between_nodes_goes_round_a_ring(on_cpu: bool) -> None:
    """Of 4 ranks' 16 rows each, 3 x 16 pass the link of a node; by an all-to-all each of 2 ranks sends 16 to each of
    2."""
    parallel = ParallelConfig(expert_ranks=4, exchange=ExchangeKind.gather)
    cfg = config(data=DataConfig(streams=8, segment=8), parallel=parallel)
    cluster = replace(PLAIN, host_copies=on_cpu)
    step = counts([[1, 0, 0, 0]] * 4, [1, 0, 1, 0])
    found = layer_times(Layout(cfg, Placement(4, 4, 2)), cluster, step)
    ring, pairs = (rows * 64 / 0.5e6 for rows in (3 * 16, 2 * 2 * 16))
    starts = (3 if on_cpu else 2) * 500e-6  # gloo sends three messages, NCCL doubles twice
    assert found.exchange == pytest.approx(4 * starts + 2 * ring + 2 * (pairs if on_cpu else ring))


def test_parts_repeat_the_experts_and_the_packing_but_not_the_shared_expert() -> None:
    """A product takes 1 us whatever its size, and starting an operation another."""
    step = counts([[8, 8], [8, 8]], [8, 8, 8, 8])

    def experts(cluster: ClusterConfig, shared_width: int, chunks: int) -> float:
        moe = replace(config().moe, shared_width=shared_width)
        cfg = config(moe=moe, parallel=ParallelConfig(expert_ranks=2, chunks=chunks))
        return layer_times(Layout(cfg, Placement(2, 2, 2)), cluster, step).experts

    products, shared = 3 * 2 * 1e-6, 3 * 2 * 1e-6
    assert experts(PLAIN, 0, 4) == pytest.approx(4 * products)
    assert experts(PLAIN, 12, 4) == pytest.approx(4 * products + shared)
    started = replace(PLAIN, operation_us=1.0)
    starts = experts(started, 0, 1) - products
    assert starts > 3 * 12e-6  # the packing's alone
    assert experts(started, 0, 4) == pytest.approx(4 * (products + starts))


def test_parts_hide_what_experts_have_time_for() -> None:
    step = counts([[8, 8], [8, 8]], [8, 8, 8, 8])
    slow = replace(PLAIN, product_fp32=[[1000.0, 1e3]])  # a product takes 1 s: experts hide all they can
    parallel = ParallelConfig(expert_ranks=2, chunks=4)
    way = 4 * 100e-6 + 8 * 64 / 1e6  # four messages
    found = layer_times(Layout(config(parallel=parallel), Placement(2, 2, 2)), slow, step)
    assert found.hidden == pytest.approx(4 * way * 3 / 4)
    assert found.exchange == pytest.approx(4 * way / 4)
    half = layer_times(Layout(config(parallel=parallel), Placement(2, 2, 2)), replace(slow, overlap=0.5), step)
    assert half.hidden == pytest.approx(found.hidden / 2)
    # experts that take no time hide nothing
    fast = replace(PLAIN, product_fp32=[[1e-9, 1e9]])
    found = layer_times(Layout(config(parallel=parallel), Placement(2, 2, 2)), fast, step)
    assert found.hidden < 1e-9
    assert found.exchange == pytest.approx(4 * way)
    # a processor that copies what it sends hides only the wait for a link, and there is none inside a node
    copying = replace(slow, host_copies=True)
    found = layer_times(Layout(config(parallel=parallel), Placement(2, 2, 2)), copying, step)
    assert found.hidden == 0.0


@pytest.mark.parametrize(("stage", "times"), [(0, 1.0), (1, 1.5), (2, 1.5), (3, 1.5)])
def test_gradients_are_summed_over_who_shares_the_weights(stage: int, times: float) -> None:
    """Stage 0 reduces; 1 and 2 also gather weights; 3 scatters and gathers twice: in all-reduces of fp32 parameters."""
    cluster = replace(PLAIN, inside=LinkConfig(1e-3, 0.0), between=LinkConfig(1e-3, 0.0))
    cfg = config(train=TrainConfig(steps=10, zero_stage=stage))
    model = build_model(cfg, VOCAB)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    shared = sum(p.numel() for p in model.parameters()) - experts
    step = counts([[8, 8], [8, 8]], [8, 8, 8, 8])
    found = StepModel(Layout(cfg, Placement(4, 2, 4)), cluster, VOCAB).time(step)
    # round a ring of n ranks an all-reduce sends 2 (n - 1) / n x bytes: 4 ranks share all but experts, 2 share half of
    # these
    ring = 2 * 3 / 4 * 4 * shared + 2 * 1 / 2 * 4 * experts / 2
    assert found.gradients == pytest.approx(times * ring / 1e6)


def test_an_all_reduce_costs_the_messages_of_both_its_halves() -> None:
    """A 4 kB all-reduce of 8 ranks takes 6 messages one after the other (as conf/cluster/dgx_h100.yaml reads its
    source)."""
    cluster = replace(PLAIN, ranks_per_node=8, inside=LinkConfig(1e9, 4.0))
    cfg = config(data=DataConfig(streams=8, segment=8), train=TrainConfig(steps=10, zero_stage=0))
    step = counts([[8]], [8, 8, 8, 8])
    found = StepModel(Layout(cfg, Placement(8, 1, 8)), cluster, VOCAB).time(step)
    assert found.gradients == pytest.approx(6 * 4e-6)


def test_ranks_on_shared_cores_are_slower() -> None:
    cluster = replace(PLAIN, sharing=[SharingConfig(1, 1.0), SharingConfig(4, 2.5)])
    assert [cluster.slowdown(n) for n in (1, 2, 4, 8)] == pytest.approx([1.0, 1.5, 2.5, 5.0])
    cfg, step = config(), counts([[16, 8], [8, 16]], [8, 8, 8, 8])
    alone = StepModel(Layout(cfg, Placement(4, 2, 4)), PLAIN, VOCAB).time(step)
    together = StepModel(Layout(cfg, Placement(4, 2, 4)), cluster, VOCAB).time(step)
    assert together.attention == pytest.approx(2.5 * alone.attention)
    assert together.exchange == pytest.approx(alone.exchange)


def test_scales_multiply_their_part_alone() -> None:
    cfg, step = config(), counts([[16, 8], [8, 16]], [8, 8, 8, 8])
    plain = StepModel(Layout(cfg, Placement(2, 2, 2)), PLAIN, VOCAB).time(step)
    scaled = replace(PLAIN, scale=ScaleConfig(attention=3.0))
    found = StepModel(Layout(cfg, Placement(2, 2, 2)), scaled, VOCAB).time(step)
    assert found.attention == pytest.approx(3 * plain.attention)
    assert found.total - plain.total == pytest.approx(2 * plain.attention)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ranks_per_node": 0}, "cluster.ranks_per_node=0"),
        ({"product_fp32": [[2.0, 1.0], [1.0, 1.0]]}, "ascending"),
        ({"product_bf16": [[1.0]]}, "pairs"),
        ({"product_bf16": [[1.0, float("inf")]]}, "pairs"),
        ({"memory_gb_per_s": 0.0}, "cluster.memory_gb_per_s=0.0"),
        ({"memory_gb_per_s": float("inf")}, "cluster.memory_gb_per_s=inf"),
        ({"device_memory_gb": -1.0}, "cluster.device_memory_gb=-1.0"),
        ({"operation_us": -1.0}, "cluster.operation_us=-1.0"),
        ({"inside": LinkConfig(gb_per_s=0)}, "cluster.inside.gb_per_s=0"),
        ({"between": LinkConfig(message_us=-1)}, "cluster.between.message_us=-1"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ClusterConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"cluster\.scale\.rest=-1"):
        ScaleConfig(rest=-1.0)
    with pytest.raises(UserError, match=r"cluster\.sharing\.slowdown=0"):
        SharingConfig(2, 0.0)
