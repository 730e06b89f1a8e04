"""Time that n-gram tables add to a step: rows on their way there, gradients on their way back, and the optimizer.

Rows are shared out over all P ranks by a hash. So each rank has about 1 / P of the distinct rows that another one
reads, and sends and changes about as many as it reads. Planning is the loader's, which works beside the step. Rows also
travel beside what comes before the layer that reads them, but here nothing hides them, and no collective waits for
another.
"""

from collections.abc import Sequence

from foreroute.engine.certificate.counts.layout import Layout
from foreroute.engine.certificate.time.cluster import ClusterConfig

_OPERATIONS = 30  # of a table in a step
_SENT, _ADDED, _UPDATED = 4, 3, 9  # passes over a table's rows: copied both ways; added up and scaled; values, moments
_READ = 6  # passes over what all tokens read, forward and backward


def table_seconds(layout: Layout, cluster: ClusterConfig, landed: Sequence[float]) -> float:
    """Model what the tables add to a step of one rank.

    Args:
        landed: of each table, distinct rows that a rank reads in a step.
    """
    config, place = layout.config, layout.placement
    row_bytes = 4.0 * config.ngram_tables.width
    read = len(landed) * config.ngram_tables.heads_read * layout.tokens * config.train.accumulation
    moved = row_bytes * ((_SENT + _ADDED + _UPDATED) * sum(landed) + _READ * read)
    starts = cluster.scale.operations * len(landed) * _OPERATIONS * cluster.operation_us * 1e-6
    own = cluster.scale.rest * float(cluster.memory_seconds(moved)) + starts
    slower = cluster.slowdown(min(place.ranks_per_node, place.world_size))
    return slower * own + _exchange_seconds(layout, cluster, landed)


def _exchange_seconds(layout: Layout, cluster: ClusterConfig, landed: Sequence[float]) -> float:
    """Model one uneven all-to-all there and one back for each table."""
    ranks, node = layout.placement.world_size, min(layout.placement.ranks_per_node, layout.placement.world_size)
    if ranks == 1:
        return 0.0
    link = cluster.between if ranks > node else cluster.inside
    num_bytes = float(sum(landed)) * layout.table_row_bytes
    port_s = num_bytes * (ranks - 1) / ranks / (cluster.inside.gb_per_s * 1e9)
    link_s = node * num_bytes * (ranks - node) / ranks / (cluster.between.gb_per_s * 1e9)
    return 2 * (len(landed) * (ranks - 1) * link.message_us * 1e-6 + max(port_s, link_s))
