"""What the products of a packed layer cost in time, as a model of a few numbers per machine."""

import math
from typing import NamedTuple

import numpy as np


class Machine(NamedTuple):
    """A device.

    Attributes:
        overhead: seconds that each operation takes at least.
        speed: multiplications a second in large products.
        bandwidth: bytes a second that products read and write.
        gathering: bytes a second that are read and written where features are picked one by one.
        lanes: rows to which a product's sides are rounded up.
        multiple: of which the columns of a first product are made: rows of vectors that end
            elsewhere are read slowly, or copied.
        panel: columns that a product takes at once; it is slower where some are left over.
        cell: numbers of a grid cell below which the product of one vector with it gets no faster;
            0 where products cell by cell are not offered.
    """

    overhead: float
    speed: float
    bandwidth: float
    gathering: float
    lanes: int
    multiple: int = 1
    panel: int = 1
    cell: int = 0

    def product(self, rows, depth, tokens: int, itemsize: int):
        """Seconds of a product of a (rows, depth) matrix with tokens vectors."""
        padded = -(-rows // self.lanes) * self.lanes * np.ceil(depth / self.lanes) * self.lanes
        moved = (rows * depth + (rows + depth) * tokens) * itemsize
        return self.overhead + np.maximum(padded * tokens / self.speed, moved / self.bandwidth)

    def copy(self, elements, itemsize: int):
        """Seconds of picking some elements."""
        return self.overhead + 2 * elements * itemsize / self.gathering

    def cells(self, shape: tuple[int, int, int], tokens: int, itemsize: int) -> float:
        """Seconds of a product over (count, depth, width) cells, each for itself."""
        if not self.cell:
            return math.inf
        count, depth, width = shape
        numbers = count * max(depth * width, self.cell)
        # A few more operations than one product, for every vector anew.
        return self.overhead + 1.3 * tokens * numbers * itemsize / self.bandwidth


#: By JAX backend. The first fits two cores of an AMD EPYC (benchmarks/deploy.py); the rates of the
#: second were seen on an H200, in bfloat16; the third is a guess from data sheets.
MACHINES = {
    "cpu": Machine(2e-5, 2e11, 4e10, 2e10, 8, panel=32, cell=1024),
    "gpu": Machine(3e-6, 3.3e14, 3.5e12, 3e12, 64, 8),
    "tpu": Machine(4e-6, 5e13, 8e11, 4e11, 128, 8),
}
