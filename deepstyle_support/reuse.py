"""What one objective after another in the same process has in common, made once."""

from collections.abc import Callable, Hashable
from typing import Any


class Reuse:
    """Keeps the `most` things that were asked for last, by what they are made from.

    Calling it with a key and a function returns what that key stands for, made by the function if it is not there.
    """

    def __init__(self, most: int = 16):
        self.most, self._kept = most, dict[Hashable, Any]()

    def __call__(self, key: Hashable, make: Callable[[], Any]) -> Any:
        self._kept[key] = self._kept.pop(key) if key in self._kept else make()  # the latest is the last
        if len(self._kept) > self.most:
            del self._kept[next(iter(self._kept))]
        return self._kept[key]
