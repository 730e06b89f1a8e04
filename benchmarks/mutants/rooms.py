"""The sources that mutants are drawn from, by room; and the draw."""

import random
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from benchmarks.mutants.places import Place, places

ROOMS: dict[str, tuple[str, ...]] = {
    "routing": ("engine/moe/[kths]*.py", "engine/moe/routers.py", "engine/moe/pl*.py", "engine/moe/live_plan.py", "engine/moe/balance.py"),
    "layer": ("engine/moe/layer.py", "engine/moe/experts.py", "engine/moe/losses.py", "engine/moe/auto.py", "engine/feed_forward.py", "engine/plan*.py", "engine/passes.py"),
    "exchange": ("engine/moe/exchange.py", "engine/moe/pipeline.py", "engine/parallel/collectives.py", "engine/parallel/flights.py", "engine/parallel/host.py", "engine/parallel/mesh.py"),
    "loader": ("engine/loader.py", "engine/batches.py", "engine/delivery.py", "engine/agreement.py"),
    "data": ("engine/data.py", "engine/corpus.py", "engine/vocab.py", "engine/glue.py", "engine/sentences.py"),
    "checkpoint": ("engine/checkpoint.py", "engine/checkpoint_files.py", "engine/saved.py"),
    "metrics": ("engine/metrics.py", "engine/window.py", "engine/totals.py", "engine/timing.py", "engine/skew.py", "engine/peak.py", "engine/arithmetic.py", "engine/wandb_run.py"),
    "optimizer": ("engine/optim.py", "engine/deepspeed_adapter.py", "engine/unused.py"),
    "kernels": ("kernels/*.py",),
}  # fmt: skip
"""Files of each room; a file of two belongs to the later one."""
TOOLS = ("kernels/interpreter.py", "kernels/testing.py")
"""Left out: they watch tests, and no program runs them."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one place."""

    room: str
    file: str
    place: Place
    new: str

    def describe(self, source_line: str) -> str:
        """Say it in a line."""
        return f"{self.file}:{self.place.line} {self.place.old} -> {self.new or 'nothing'}: {source_line.strip()}"


def files_of(root: Path, rooms: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Find each file's room."""
    found: dict[str, str] = {}
    for room, patterns in rooms.items():
        for pattern in patterns:
            for path in sorted(root.glob(pattern)):
                name = str(path.relative_to(root))
                if name not in TOOLS:
                    found[name] = room
    return found


def draw(root: Path, rooms: dict[str, tuple[str, ...]], seed: int) -> list[Mutant]:
    """Draw all places in random order, the rooms in turn; each with one change."""
    generator = random.Random(seed)
    by_room: dict[str, list[Mutant]] = {room: [] for room in rooms}
    for file, room in sorted(files_of(root, rooms).items()):
        for place in places((root / file).read_text()):
            by_room[room].append(Mutant(room, file, place, generator.choice(place.changes)))
    for mutants in by_room.values():
        generator.shuffle(mutants)
    return [mutant for turn in zip_longest(*by_room.values()) for mutant in turn if mutant]
