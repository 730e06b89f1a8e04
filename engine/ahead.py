"""An iterator that takes items before they are asked for, such as work that others have begun."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Ahead(Iterator[Item]):
    """The items of an iterable, of which `depth` more are taken than were asked for.

    Example: with depth 1 over numbers, next() returns 0 when 0 and 1 have been taken.
    """

    def __init__(self, items: Iterable[Item], depth: int) -> None:
        self._items, self._depth = iter(items), depth
        self._waiting: deque[Item] = deque()
        self._ended = False

    def __next__(self) -> Item:
        while not self._ended and len(self._waiting) <= self._depth:
            try:
                self._waiting.append(next(self._items))
            except StopIteration:
                self._ended = True
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft()

    @property
    def last(self) -> bool:
        """Whether no item follows those that were asked for, if depth is at least 1."""
        return self._ended and not self._waiting
