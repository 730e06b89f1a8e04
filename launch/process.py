"""What a process needs before training: threads, a quiet start, and a stop that waits for the end of a step."""

import os
import signal
from types import FrameType

import torch


class StopSignal:
    """Notes SIGINT and SIGTERM; the trainer asks between steps. A second signal ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        """Say whether a stop was asked for."""
        return self.number != 0

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it, so that scripts see an unfinished run."""
        return 128 + self.number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)


def set_up(threads: int) -> None:
    """Set PyTorch's CPU threads (0 leaves the default) and make denormals zero."""
    if threads:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_flush_denormal(True)
