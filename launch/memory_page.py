"""The memory section of a certificate: rows for a table, and the lines above and below it."""

from engine.certificate.memory import Memory


def memory_table(memory: Memory) -> tuple[list[str], list[list[str]]]:
    """Give the header and the cells of the terms at the peak, the largest first, and their sum.

    A term whose formula is a sum goes on in the next rows.
    """
    rows = []
    for term in sorted(memory.terms, key=lambda term: -term.bytes):
        first, *others = term.formula.split(" + ")
        rows.append([term.name, f"{term.bytes / 1e6:,.2f}", "host" if term.host else "", first])
        rows += [["", "", "", f"+ {part}"] for part in others]
    total = sum(term.bytes for term in memory.terms)
    return ["what", "MB (1e6)", "where", "formula"], [*rows, ["all", f"{total / 1e6:,.2f}", "", ""]]


def memory_heading(memory: Memory) -> str:
    """Say what the table counts and when."""
    device = "a GPU with the Triton kernels" if memory.gpu else "a CPU"
    return (
        f"Tensors of the rank that needs the most, on {device}, when it does: {memory.when}, k = {memory.k}, "
        f"{memory.streams} streams in a micro-batch"
    )


def verdict_line(memory: Memory) -> str:
    """Say whether it fits."""
    verdict = memory.verdict
    peak = f"{memory.peak_bytes / 1e9:,.3f} GB"
    if verdict is None:
        return f"{peak} at the peak; with device_memory_gb=80 this line says whether it fits"
    device, left = verdict.device_bytes / 1e9, abs(verdict.headroom_bytes) / 1e9
    fits = f"fits into {device:,.3f} GB: {left:,.3f} GB are left"
    if not verdict.fits:
        fits = f"does not fit into {device:,.3f} GB: {left:,.3f} GB are missing"
    most = f"at most {verdict.largest_streams} streams of a rank in a micro-batch fit"
    if not verdict.largest_streams:
        most = "not even one stream of a rank in a micro-batch fits"
    return f"{peak} at the peak: {fits}; {most}"
