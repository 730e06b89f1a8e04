"""Lines for the reader: each thing that a run does and the time model leaves out."""

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.time.cluster import ClusterConfig
from foreroute.engine.config.enums import MatmulPrecision, NgramEntry, RowPlace


def left_out(layout: Layout, cluster: ClusterConfig) -> list[str]:
    """List what the run does and engine/certificate/time/step_time.py does not model."""
    config = layout.config
    train, kernels, on_cpu = config.train, config.kernels, cluster.host_copies
    tables = config.ngram_tables
    inputs = tables.heads_read * tables.width
    lines = {
        "train.offload: weights are updated as if on the device, and nothing travels between host and device": (
            train.offload
        ),
        "train.zero_stage=3: DeepSpeed sends weights and gradients beside computation, here nothing hides them": (
            train.zero_stage == 3 and not on_cpu
        ),
        "a dense n-gram table: looking up its rows and writing their gradient takes no time": (
            config.dense_table is not None
        ),
        "ngram_tables: products of their entries, such as projections and gates, take no time": (
            bool(tables.places) and (tables.entry is not NgramEntry.add or inputs != config.model.width)
        ),
        "ngram_tables.place=host: rows are fetched and written back beside the step": (
            bool(tables.places) and tables.place is RowPlace.host and not on_cpu
        ),
        f"kernels.precision={kernels.precision.value}: products run at the rate of product_fp32": (
            kernels.precision is not MatmulPrecision.ieee
        ),
        "kernels.masked_from_k: a run measures it at its start; here all experts are grouped, as below it": (
            on_cpu and kernels.masked_from_k is None
        ),
    }
    return [line for line, true in lines.items() if true]
