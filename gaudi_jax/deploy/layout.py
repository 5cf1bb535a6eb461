"""From the places of blocks to the matrix products of a packed layer: a pure function.

Columns whose input windows are alike share one first product, on the window that covers them all;
the output axis is cut into runs, and each run is one second product of the columns that write to
it. Both merge pieces while the zeros that this multiplies cost less than one product more, by the
model of `machine.py`.
"""

import math
from typing import NamedTuple

import numpy as np

from gaudi_jax.deploy.machine import Machine
from gaudi_jax.layers.packed import Layout, Read, Write


class Windows(NamedTuple):
    """Cyclic windows of the columns on one axis, in features; none is empty.

    Attributes:
        start: first features, shape (K,).
        length: features, shape (K,).
        size: of the axis.
    """

    start: np.ndarray
    length: np.ndarray
    size: int


class Compiled(NamedTuple):
    """A layout, and the columns that it is for.

    Attributes:
        layout: the products, or None for one product with the composed kernel.
        order: the columns in the order of the layout; K, their number, for a column of zeros.
        seconds: that they take, by the model.
    """

    layout: Layout | None
    order: np.ndarray
    seconds: float


def compile_layout(
    reads: Windows, writes: Windows, machine: Machine, tokens: int, itemsize: int = 4
) -> Compiled:
    """The fastest layout of some columns, by the model.

    Args:
        reads: windows of the columns on the input axis.
        writes: the same on the output axis.
        machine: on which it runs.
        tokens: input vectors at once.
        itemsize: bytes of a number.

    Example:
        Two columns on the same inputs share a product; the outputs are cut where they change:

        >>> import numpy as np
        >>> from gaudi_jax.deploy.layout import Windows, compile_layout
        >>> from gaudi_jax.deploy.machine import Machine
        >>> fine = Machine(0.0, 1.0, 1e9, 1e9, 1)
        >>> reads = Windows(np.array([0, 0]), np.array([4, 4]), 8)
        >>> writes = Windows(np.array([0, 2]), np.array([2, 6]), 8)
        >>> layout, order, _ = compile_layout(reads, writes, fine, tokens=64)
        >>> [tuple(read) for read in layout.reads]
        [(0, 4, 2)]
        >>> [tuple(write) for write in layout.writes]
        [(0, 2, ((0, 1),)), (2, 6, ((1, 2),))]
    """
    dense = machine.product(writes.size, reads.size, tokens, itemsize)
    groups, seconds = _group(reads, machine, tokens, itemsize)
    # Inside a group the columns may stand in any order: neighbours write to the same runs.
    groups = [
        (
            start,
            length,
            _padded(
                columns[np.lexsort((writes.length[columns], writes.start[columns]))],
                machine,
                len(reads.start),
            ),
        )
        for start, length, columns in groups
    ]
    order = np.concatenate([columns for *_, columns in groups] or [np.zeros(0, int)])
    cuts, more = _cut(writes, machine, tokens, itemsize)
    seconds += more
    if dense <= seconds:
        return Compiled(None, order, float(dense))
    inside = np.pad(_inside(writes, cuts), ((0, 1), (0, 0)))[order]
    _, whole = _run_price(np.diff(cuts), inside.sum(axis=0), len(order), machine, tokens, itemsize)
    inside = inside | whole
    layout = Layout(
        tuple(Read(int(start), int(length), len(columns)) for start, length, columns in groups),
        tuple(
            Write(int(first), int(last - first), _as_ranges(np.flatnonzero(active)))
            for first, last, active in zip(cuts[:-1], cuts[1:], inside.T, strict=True)
        ),
    )
    return Compiled(layout, order, float(seconds))


def _padded(columns: np.ndarray, machine: Machine, zeros: int) -> np.ndarray:
    """Fills the last panel with columns of zeros, unless these are more than an eighth."""
    more = -len(columns) % math.lcm(machine.panel, machine.multiple)
    if 8 * more > len(columns):
        more = -len(columns) % machine.multiple
    return np.pad(columns, (0, more), constant_values=zeros)


def _group(
    windows: Windows, machine: Machine, tokens: int, itemsize: int
) -> tuple[list[tuple[int, int, np.ndarray]], float]:
    """Merges the columns' windows, the pair that saves most at a time."""
    size = windows.size
    pairs = np.stack([windows.start % size, windows.length], axis=1)
    distinct, member = np.unique(pairs, axis=0, return_inverse=True)
    members = [np.flatnonzero(member.ravel() == i) for i in range(len(distinct))]
    if not len(distinct):
        return [], 0.0
    start, length = distinct.T.copy()
    count = np.array([len(columns) for columns in members])

    def price(length, count):
        moved = np.where(length < size, machine.copy(length * tokens, itemsize), 0)
        return moved + machine.product(count, length, tokens, itemsize)

    def saving(i):
        hull_length = _hull(start[i], length[i], start, length, size)[1]
        gain = own + own[i] - price(hull_length, count + count[i])
        gain[i] = -np.inf
        return np.where(np.isfinite(own), gain, -np.inf)

    own = price(length, count).astype(float)
    savings = np.stack([saving(i) for i in range(len(own))])
    while True:
        i, j = np.unravel_index(np.argmax(savings), savings.shape)
        if not savings[i, j] > 0:
            break
        start[i], length[i] = _hull(start[i], length[i], start[j], length[j], size)
        count[i] += count[j]
        members[i] = np.concatenate([members[i], members[j]])
        own[i], own[j] = price(length[i], count[i]), np.inf
        savings[j] = savings[:, j] = -np.inf
        savings[i] = savings[:, i] = saving(i)
    kept = [i for i in np.argsort(start, kind="stable") if np.isfinite(own[i])]
    return [(start[i], length[i], members[i]) for i in kept], float(own[kept].sum())


def _hull(start_a, length_a, start_b, length_b, size: int):
    """The shortest cyclic window that covers two."""
    from_a = np.maximum(length_a, (start_b - start_a) % size + length_b)
    from_b = np.maximum(length_b, (start_a - start_b) % size + length_a)
    length = np.minimum(np.minimum(from_a, from_b), size)
    start = np.where(from_a <= from_b, start_a, start_b)
    return np.where(length == size, 0, start), length


def _cut(windows: Windows, machine: Machine, tokens: int, itemsize: int):
    """The cheapest cuts of the output axis, by dynamic programming over all window edges.

    Runs are put together by a copy, which one run alone does not need.
    """
    size = windows.size
    ends = windows.start + windows.length
    edges = np.unique(np.concatenate([[0, size], windows.start % size, ends % size]))
    active = _active(windows, edges)
    span = edges[None, :] - edges[:, None]
    price, _ = _run_price(span, active, len(windows.start), machine, tokens, itemsize)
    best, origin = np.zeros(len(edges)), np.zeros(len(edges), int)
    for j in range(1, len(edges)):
        total = best[:j] + price[:j, j]
        origin[j] = np.argmin(total)
        best[j] = total[origin[j]]
    cuts = [len(edges) - 1]
    while cuts[-1]:
        cuts.append(origin[cuts[-1]])
    joined = float(best[-1]) + machine.copy(size * tokens, itemsize)
    alone = float(price[0, -1])
    return (edges[cuts[::-1]], joined) if joined < alone else (edges[[0, -1]], alone)


def _run_price(span, active, columns: int, machine: Machine, tokens: int, itemsize: int):
    """Seconds of a run, and whether it takes all columns: nothing is picked then."""
    picked = machine.product(span, active, tokens, itemsize)
    picked = picked + machine.copy(active * tokens, itemsize)
    whole = machine.product(span, columns, tokens, itemsize)
    return np.where(active > 0, np.minimum(picked, whole), 0), (active > 0) & (whole <= picked)


def _active(windows: Windows, edges: np.ndarray) -> np.ndarray:
    """Columns that write to the run between two edges, for all pairs of edges."""
    start, end = windows.start % windows.size, windows.start % windows.size + windows.length
    wraps = end > windows.size
    # A plain window misses a run that begins after its end, or ends before its start.
    plain = ~wraps
    after = (end[plain][None] <= edges[:, None]).sum(axis=1)
    before = (start[plain][None] >= edges[:, None]).sum(axis=1)
    count = plain.sum() - after[:, None] - before[None, :]
    # One that wraps misses a run inside its gap.
    clear = (end[wraps] - windows.size)[None] <= edges[:, None]
    free = start[wraps][None] >= edges[:, None]
    return count + wraps.sum() - clear.astype(int) @ free.astype(int).T


def _inside(windows: Windows, cuts: np.ndarray) -> np.ndarray:
    """Which columns write to which run, shape (K, runs)."""
    start = (windows.start % windows.size)[:, None]
    end = start + windows.length[:, None]
    before, after = start < cuts[None, 1:], end > cuts[None, :-1]
    around = end - windows.size > cuts[None, :-1]
    return (before & after) | around


def _as_ranges(indices: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Rising indices as ranges (first, last + 1)."""
    if not len(indices):
        return ()
    breaks = np.flatnonzero(np.diff(indices) > 1)
    firsts = indices[np.concatenate([[0], breaks + 1])]
    lasts = indices[np.concatenate([breaks, [len(indices) - 1]])] + 1
    return tuple((int(first), int(last)) for first, last in zip(firsts, lasts, strict=True))
