"""Where the blocks of `spread` lie: on equal parts of both axes, which meet evenly."""

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

#: Steps on both axes that leave the most even gaps in the plane: 1/g and 1/g², g³ = g + 1.
STEPS = 0.7548776662466927, 0.5698402909980532
#: Of what is spent at most, what is enough: more blocks are worth more than the rest.
ENOUGH = 0.98


class Windows(NamedTuple):
    """Where blocks lie, in cells.

    Attributes:
        start: first cells, shape (2, S); row 0 input, row 1 output.
        length: cells, shape (2, S); 0 for slots that are free.
        cost: multiplications of all blocks.
    """

    start: np.ndarray
    length: np.ndarray
    cost: int

    @property
    def blocks(self) -> int:
        """Slots in use."""
        return int(np.count_nonzero(self.length[0]))


def least_cost(shape: tuple[int, int], cell: tuple[int, int], rank: int, parts: int | None) -> int:
    """The fewest multiplications of blocks that read all inputs and write all outputs.

    Args:
        shape: (in, out) of the kernel.
        cell: features of a grid cell on both axes.
        rank: columns of a block.
        parts: the most that each axis is cut into; None for no limit.
    """
    return min(
        _on_parts(pair, max(pair), shape, cell, rank).cost
        for pair in _sparsest(shape, cell, rank, parts)
    )


def spread_windows(
    shape: tuple[int, int], cell: tuple[int, int], cost: int, rank: int, parts: int | None
) -> Windows:
    """The windows of `spread`: as many as a cost buys, on parts of both axes.

    Args:
        shape: (in, out) of the kernel.
        cell: features of a grid cell on both axes.
        cost: multiplications that they may cost, no fewer than `least_cost`.
        rank: columns of a block.
        parts: the most that each axis is cut into; None for no limit.
    """
    n, m = shape
    slots, most = min(shape) // rank, _most_parts(shape, cell, parts)
    if cost >= n * m and most[n > m] >= slots:  # strips of the kernel itself
        pair = (1, slots) if n > m else (slots, 1)
        return _on_parts(pair, slots, shape, cell, rank)
    # Smaller blocks of these proportions have fewer entries than their factors.
    smallest = rank * (n + m) ** 2 / (n * m)
    both = min(max(cost / rank / slots, smallest), cost / rank)
    second = max(both * m / (n + m), cell[1])
    first = max(both - second, cell[0])
    lengths = first, max(both - first, cell[1])
    choices = [
        sorted({min(max(f(size / length), 1), limit) for f in (math.floor, math.ceil)})
        for size, length, limit in zip(shape, lengths, most, strict=True)
    ]
    every = _covering(itertools.product(*choices), shape, cell, cost, rank)
    if not every:  # each block is as dear as its entries: one on each part
        number = min(*most, slots, math.ceil(n * m / cost))
        pairs = [(number, number), *_sparsest(shape, cell, rank, parts)]
        return max(_covering(pairs, shape, cell, cost, rank), key=lambda found: found.cost)
    enough = ENOUGH * max(found.cost for found in every)
    return max(
        (found for found in every if found.cost >= enough),
        key=lambda found: (found.blocks, found.cost),
    )


def _most_parts(
    shape: tuple[int, int], cell: tuple[int, int], parts: int | None
) -> tuple[int, int]:
    n, m = (min(size // c, parts or size) for size, c in zip(shape, cell, strict=True))
    return n, m


def _sparsest(
    shape: tuple[int, int], cell: tuple[int, int], rank: int, parts: int | None
) -> list[tuple[int, int]]:
    """Counts of parts of which one has the cheapest blocks that cover both axes."""
    slots, most = min(shape) // rank, _most_parts(shape, cell, parts)
    return [(1, 1), (min(*most, slots),) * 2, (min(most[0], slots), min(most[1], slots))]


def _covering(
    pairs: Iterable[tuple[int, ...]],
    shape: tuple[int, int],
    cell: tuple[int, int],
    cost: int,
    rank: int,
) -> list[Windows]:
    """For each pair of counts of parts as many blocks as a cost buys; if each part gets one."""
    slots, found = min(shape) // rank, []
    for pair in pairs:
        a, b = (size / p for size, p in zip(shape, pair, strict=True))
        count = min(slots, int(cost // min(rank * (a + b), a * b)) + 1)
        while count >= max(pair):
            windows = _on_parts(pair, count, shape, cell, rank)
            if windows.cost <= cost:
                found.append(windows)
                break
            count -= 1
    return found


def _on_parts(
    parts: tuple[int, ...], count: int, shape: tuple[int, int], cell: tuple[int, int], rank: int
) -> Windows:
    """Windows of a number of blocks on so many parts of each axis."""
    edges = [
        np.arange(p + 1) * (size // c) // p for p, size, c in zip(parts, shape, cell, strict=True)
    ]
    start, length = np.zeros((2, 2, min(shape) // rank), np.int32)
    for axis, (step, edge) in enumerate(zip(STEPS, edges, strict=True)):
        # By their order instead of their place: equally many blocks for each part.
        place = (0.5 + step * np.arange(count)) % 1
        chosen = np.argsort(np.argsort(place)) * parts[axis] // count
        start[axis, :count], length[axis, :count] = edge[chosen], np.diff(edge)[chosen]
    sizes = length[:, :count] * np.array(cell)[:, None]
    cost = int(np.minimum(rank * sizes.sum(axis=0), sizes.prod(axis=0)).sum())
    return Windows(start, length, cost)
