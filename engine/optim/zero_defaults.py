"""DeepSpeed's defaults for ZeRO that determine memory use."""

KEPT_WHOLE = 100_000
"""Elements: at ZeRO-3, parameters up to this size stay gathered; DeepSpeed's default."""


MAX_BUCKET = 500_000_000  # elements; DeepSpeed's default
