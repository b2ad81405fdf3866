"""The interface of everything that masks come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np


class MaskSource(ABC):
    """Gives the masks of a run. Picklable."""

    is_constant = False
    """whether all masks of a size are the same"""

    @abstractmethod
    def sample(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """A mask uint8 [height, width], 1 = hole."""

    @abstractmethod
    def describe(self) -> str:
        """One line for reports."""

    def iterate_fixed_set(self, height: int, width: int, count: int, seed: int) -> Iterator[np.ndarray]:
        """`count` masks that are a pure function of the arguments, one at a time."""
        return (self.sample(height, width, np.random.default_rng((seed, n))) for n in range(count))

    def fixed_set(self, height: int, width: int, count: int, seed: int) -> list[np.ndarray]:
        """`iterate_fixed_set` as a list."""
        return list(self.iterate_fixed_set(height, width, count, seed))
