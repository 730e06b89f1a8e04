"""The memory section of a certificate's page: the terms at the peak with their formulas, and a verdict."""

from foreroute.engine.certificate.memory.peak import Memory
from foreroute.launch.page import parts as page
from foreroute.launch.page.parts import KeyFigure, Table
from foreroute.launch.page.words import byte_text


def memory_verdict(memory: Memory) -> KeyFigure:
    """Return whether the run fits into the device, if one was named."""
    peak, verdict = f"{byte_text(memory.peak_bytes)} at the peak ({memory.when})", memory.verdict
    if verdict is None:
        return KeyFigure("Fits", "unknown", f"{peak}; cluster=NAME or device_memory_gb=80 says it")
    left = f"{byte_text(abs(verdict.headroom_bytes))} {'left' if verdict.fits else 'missing'}"
    note = f"{peak}; {left}, by formula"
    return KeyFigure("Fits", "yes" if verdict.fits else "no", note, good=verdict.fits)


def memory_section(memory: Memory) -> page.Section:
    """Describe the memory part."""
    return page.Section("Memory", [_lead(memory), _terms(memory), _verdict(memory)])


def _lead(memory: Memory) -> str:
    device = "a GPU with the Triton kernels" if memory.gpu else "a CPU"
    text = (
        f"Tensors of the rank that needs the most, on {device}, when it does: {memory.when}, k = {memory.k}, "
        f"{memory.streams} streams in a micro-batch. The libraries' own memory is not in it, nor are "
        "validation and evaluation, which keep nothing for backward but have eval.streams streams."
    )
    if memory.uncounted_k:
        ks = ", ".join(str(k) for k in memory.uncounted_k)
        text += f" Not looked at: steps of k = {ks}, of which none was counted; they may need more."
    return text


def _terms(memory: Memory) -> Table:
    """List the terms, the largest first; a term whose formula is a sum goes on in the next rows. A column says where
    each one is, if any is on the host."""
    header, rows = ["what", "where", "formula", "MB (1e6)"], []
    for term in sorted(memory.terms, key=lambda term: -term.bytes):
        first, *others = term.formula.split(" + ")
        rows.append([term.name, "host" if term.host else "device", first, f"{term.bytes / 1e6:,.2f}"])
        rows += [["", "", f"+ {part}", ""] for part in others]
    total = sum(term.bytes for term in memory.terms)
    rows.append(["all", "", "", f"{total / 1e6:,.2f}"])
    if not any(term.host for term in memory.terms):
        for row in (header, *rows):
            del row[1]
    return Table(header, rows, text_columns=len(header) - 1)


def _verdict(memory: Memory) -> page.Part:
    verdict = memory.verdict
    peak = f"{memory.peak_bytes / 1e9:,.3f} GB at the peak"
    if verdict is None:
        return f"{peak}; cluster=NAME or device_memory_gb=80 says whether it fits."
    device, left = verdict.device_bytes / 1e9, abs(verdict.headroom_bytes) / 1e9
    fits = f"fits into {device:,.3f} GB: {left:,.3f} GB are left"
    if not verdict.fits:
        fits = f"does not fit into {device:,.3f} GB: {left:,.3f} GB are missing"
    most = f"at most {verdict.largest_streams:,} streams of a rank in a micro-batch fit"
    if not verdict.largest_streams:
        most = "not even one stream of a rank in a micro-batch fits"
    return page.Verdict(f"{peak}: {fits}; {most}", verdict.fits)
