"""What one picture after another in the same process has in common, made once."""

from collections.abc import Callable, Hashable
from typing import Any


class Cache:
    """Keeps the `size` things that were asked for last, by what they are made from."""

    def __init__(self, size: int = 16):
        self.size, self._kept = size, dict[Hashable, Any]()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What the key stands for, made by the function if it is not there."""
        self._kept[key] = self._kept.pop(key) if key in self._kept else make()  # the latest is the last
        if len(self._kept) > self.size:
            del self._kept[next(iter(self._kept))]
        return self._kept[key]
