"""Output in the terminal: notes, a progress bar on a terminal, plain lines elsewhere, and tables.

Rich makes colours and tables. Bars are tqdm's: Rich's hide the cursor, and a run that is killed would leave it hidden.
"""

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

_BAR = "{percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}]{postfix}"  # cut on the right
LINE_S = 10.0
"""Seconds between two lines of a stage."""
_WIDEST = 10_000  # columns


class _Lasting:
    """A stream whose reader may go away: after the first failed write everything is discarded."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._or_nowhere():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._or_nowhere():
            self._stream.flush()

    @contextmanager
    def _or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting() -> Iterator[None]:
    """Ignore failures of stdout and stderr in the block: a full disk, a closed terminal or `head` ends no training."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Lasting, streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class Console:
    """Progress of one run; a bar when stdout is a terminal, else one line per logged step."""

    def __init__(self, total_steps: int, *, enabled: bool = True) -> None:
        self._total = total_steps
        self._enabled = enabled
        self._bar: tqdm | None = None  # type: ignore[type-arg]
        self._terminal = _has_bars()

    def note(self, line: str) -> None:
        """Print a line above the progress bar."""
        if self._enabled:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def step(self, step: int) -> None:
        """Advance the bar to `step` finished steps."""
        if not (self._enabled and self._terminal):
            return
        if self._bar is None:
            self._bar = tqdm(
                total=self._total, initial=step, unit="step", dynamic_ncols=True, file=sys.stdout, bar_format=_BAR
            )
        self._bar.update(step - self._bar.n)

    def metrics(self, step: int, values: Mapping[str, float], seconds_left: float) -> None:
        """Show the metrics of a logged step."""
        text = " ".join(
            f"{name} {values[key]:{form}}"
            for name, key, form in (
                ("loss", "loss", ".3f"),
                ("bpc", "bpc", ".3f"),
                ("k", "k", ".0f"),
                ("tok/s", "tokens_per_second", ",.0f"),
            )
        )
        self.say(step, text, seconds_left)

    def say(self, step: int, text: str, seconds_left: float) -> None:
        """Show a text beside the bar, or in a line of its own."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._enabled:
            self.note(f"step {step}/{self._total}  {text}  left {clock(seconds_left)}")

    def close(self) -> None:
        """Keep the bar as it is and continue below it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Stages:
    """Progress of work in stages, such as an evaluation at each k: on a terminal a bar for the present stage.

    Elsewhere a line at the end of each, and every LINE_S seconds of a long one.

    Args:
        now: a clock, in seconds.
    """

    def __init__(self, *, enabled: bool = True, now: Callable[[], float] = time.monotonic) -> None:
        self._enabled, self._now = enabled, now
        self._terminal = _has_bars()
        self._bar: tqdm | None = None  # type: ignore[type-arg]
        self._started = self._said = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of a stage's `total` parts are finished; 0 begins a stage."""
        if not self._enabled:
            return
        if done == 0:
            self._begin(stage, total)
        elif self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif done == total or self._now() >= self._said + LINE_S:
            self._say(stage, done, total)

    def _begin(self, stage: str, total: int) -> None:
        self.close()
        self._started = self._said = self._now()
        if self._terminal:
            self._bar = tqdm(
                desc=f"{stage:<8}",
                total=total,
                leave=False,
                dynamic_ncols=True,
                file=sys.stdout,
                bar_format="{desc}" + _BAR,
            )

    def _say(self, stage: str, done: int, total: int) -> None:
        self._said = self._now()
        seconds = self._said - self._started
        left = clock(seconds / done * (total - done))
        end = f"left {left}" if done < total else f"took {clock(seconds)}"
        print(f"{stage:<8}  {done}/{total}  {end}", flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _has_bars() -> bool:
    """Return whether stdout is a terminal with a size.

    mpirun gives its processes one without columns when its own output goes elsewhere; tqdm needs lines, too.
    """
    return sys.stdout.isatty() and min(os.get_terminal_size(sys.stdout.fileno())) > 0


def rich_console(file: TextIO | None, width: int | None = None) -> RichConsole:
    """Open a Rich console that styles nothing where the file is no terminal or NO_COLOR is set.

    Args:
        file: None for stdout.
        width: columns; None for the terminal's own.
    """
    plain = bool(os.environ.get("NO_COLOR"))
    return RichConsole(
        file=file, width=width, color_system=None if plain else "auto", highlight=False, markup=False, emoji=False
    )


def styled(line: str, style: str, file: TextIO) -> str:
    """Return a line in a style of Rich's, such as "bold red", for a file that may be no terminal; it is not wrapped."""
    console = rich_console(file)
    with console.capture() as written:
        console.print(Text(line, style), end="", soft_wrap=True)
    return written.get()


def clock(seconds: float) -> str:
    """Write a duration as m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out cells in columns, the first aligned left, as wide as they are."""
    file = StringIO()
    console = rich_console(file)
    print_grid(console, grid(header, rows, whole=range(len(header)), right=range(1, len(header))))
    return file.getvalue().removesuffix("\n")


def grid(
    header: Sequence[str], rows: Sequence[Sequence[str | Text]], *, whole: Collection[int], right: Collection[int] = ()
) -> Table:
    """Lay out cells in columns two spaces apart.

    Args:
        header: may be empty.
        whole: columns that never wrap; the others wrap between words.
        right: columns that are aligned right.
    """
    found = Table(box=None, show_header=bool(header), header_style="", pad_edge=False, padding=(0, 2, 0, 0))
    for i, cells in enumerate(zip(*rows, strict=True) if rows else [()] * len(header)):
        texts = [*header[i : i + 1], *map(str, cells)]
        pieces = (piece for text in texts for piece in ([text] if i in whole else text.split()))
        found.add_column(
            header[i] if header else "",
            justify="right" if i in right else "left",
            no_wrap=i in whole,
            min_width=max(map(cell_len, pieces), default=1),
        )
    for row in rows:
        found.add_row(*row)
    return found


def print_grid(console: RichConsole, what: Table | Text) -> None:
    """Print without spaces at the ends of lines; what cannot be narrower than the console is printed wider."""
    least = Measurement.get(console, console.options.update(width=_WIDEST), what).minimum
    console.width = max(console.width, least)
    with console.capture() as written:
        console.print(what, crop=False)
    for line in written.get().splitlines():
        console.file.write(line.rstrip() + "\n")
