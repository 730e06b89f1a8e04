"""The sources that mutants are drawn from, by room; and the draw."""

import random
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from benchmarks.mutants.places import Place, places

ROOMS: dict[str, tuple[str, ...]] = {
    "routing": tuple(f"engine/routing/{room}*.py" for room in ("", "plans/", "planned/", "live/")),
    "layer": (
        "engine/moe/layer.py",
        "engine/moe/gate.py",
        "engine/moe/zero_experts.py",
        "engine/moe/experts.py",
        "engine/moe/feed_forward.py",
        "engine/routing/losses.py",
        "engine/routing/plans/exchange_choice.py",
        "engine/plug_in/*.py",
        "engine/convert/*.py",
    ),
    "exchange": (
        "engine/moe/exchange.py",
        "engine/moe/overlap.py",
        "engine/parallel/collectives.py",
        "engine/parallel/in_flight.py",
        "engine/parallel/cpu_group.py",
        "engine/parallel/mesh.py",
    ),
    "tables": ("engine/ngram_tables/*.py", "engine/routing/plans/row_plan.py"),
    "data": (
        "engine/data/*.py",
        "engine/data/sources/*.py",
        "engine/data/tokens/*.py",
        "engine/finetune/choices.py",
        "engine/finetune/equations.py",
        "engine/finetune/glue.py",
        "engine/finetune/held_out.py",
        "engine/finetune/masking.py",
        "engine/finetune/sentences.py",
    ),
    "loader": (
        "engine/data/loader.py",
        "engine/data/planned_batches.py",
        "engine/data/device_copy.py",
        "engine/nested.py",
        "engine/ahead.py",
        "engine/data/plan_agreement.py",
    ),
    "checkpoint": ("engine/checkpoint/*.py", "engine/sealed_files.py"),
    "compress": ("engine/compress/*.py", "engine/moe/int8_weights.py"),
    "metrics": ("engine/metrics/*.py", "engine/model/flops.py"),
    "optimizer": ("engine/optim/*.py", "engine/config/unused_options.py"),
    "kernels": (
        "kernels/*.py",
        "kernels/ops/*.py",
        "kernels/cpu/*.py",
        "kernels/gpu/*.py",
        "kernels/testing/byte_counts.py",
    ),
}
"""Files of each room; a file of two belongs to the later one."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one place."""

    room: str
    file: str
    place: Place
    new: str

    def describe(self, source_line: str) -> str:
        """Return the mutant in one line."""
        return f"{self.file}:{self.place.line} {self.place.old} -> {self.new or 'nothing'}: {source_line.strip()}"


def files_of(root: Path, rooms: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Find each file's room."""
    found: dict[str, str] = {}
    for room, patterns in rooms.items():
        for pattern in patterns:
            for path in sorted(root.glob(pattern)):
                name = str(path.relative_to(root))
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
