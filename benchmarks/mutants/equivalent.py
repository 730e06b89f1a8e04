"""Mutants that no test can tell from the program, listed by hand: benchmarks/mutants/equivalent.toml.

Each entry has the `file`, the whole `line` (spaces around it aside), the change `old` to `new` (`new` may be left out:
any), the number `which` if the line has its text more than once (0 is the first), and the `reason`.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from benchmarks.mutants.places import Place

LIST = Path(__file__).with_name("equivalent.toml")


@dataclass(frozen=True, slots=True)
class Equivalent:
    """An entry of the list."""

    file: str
    line: str
    old: str
    reason: str
    new: str | None = None
    which: int | None = None  # of the same tokens in the line; None: each

    def covers(self, file: str, source_line: str, place: Place, new: str) -> bool:
        """Return whether a mutant is this one."""
        before = source_line[: place.columns[0]]
        return (
            (self.file, self.line, self.old) == (file, source_line.strip(), place.old)
            and self.new in (None, new)
            and self.which in (None, before.count(self.old))
        )


def read_list(path: Path = LIST) -> list[Equivalent]:
    """Read the list."""
    entries = tomllib.loads(path.read_text()).get("mutant", [])
    return [Equivalent(**entry) for entry in entries]
