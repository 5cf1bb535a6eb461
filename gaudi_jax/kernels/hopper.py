"""A block-sparse product for Hopper GPUs, in Pallas Mosaic GPU.

A program goes through tiles of the result. One warpgroup copies the input cells that a tile reads
and their weights to shared memory, over a ring of slots; two warpgroups multiply, each half of the
rows. The ring goes on over the ends of tiles: while one tile is written, the next is loaded.
"""

import functools
import heapq
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from gaudi_jax.kernels.table import CELL, Table

# Of an H100 and an H200, for a lowering where there is none.
_MULTIPROCESSORS = 132
# Warpgroups that multiply; one more copies.
_MULTIPLY = 2
# Registers a thread of the copying warpgroup keeps; the others share what it gives up.
_COPY_REGISTERS, _MULTIPLY_REGISTERS = 40, 232
# The result goes out in pieces of so many rows and columns: the buffers for it are small.
_PIECE = (64, 64)


class Tiling(NamedTuple):
    """How the product is cut; the columns of a tile are those of the weights.

    Attributes:
        rows: tokens in a tile, 128 or 256. An accumulator has rows / 2 * columns / 128 registers
            a thread, and at most 128 of them fit.
        slots: cells in flight.
        peers: multiprocessors that share the weights they load, each with its own tokens: 1 or 2.
    """

    rows: int = 128
    slots: int = 4
    peers: int = 1

    def shared_memory(self, columns: int) -> int:
        """Bytes of shared memory, short of the barriers; a program has 227 KiB."""
        slot = (self.rows + columns) * CELL
        pieces = _MULTIPLY * self.buffers(columns) * math.prod(_PIECE)
        return 2 * (self.slots * slot + pieces)

    def buffers(self, columns: int) -> int:
        """Buffers of pieces of a warpgroup: two that take turns, if they end a tile in turn."""
        pieces = self.rows // _MULTIPLY * columns // math.prod(_PIECE)
        return 2 if pieces % 2 == 0 else 1


def multiply(
    x: Array,
    tiles: Array,
    table: Table,
    bias: Array | None = None,
    *,
    tiling: Tiling,
    programs: int | None = None,
    interpret: Any = None,
) -> Array:
    """A block-sparse product, on a GPU.

    Columns j * N to (j + 1) * N of the result are the sum, over the cells of tile j, of `x` at the
    cell times the weights of the cell, and the bias.

    Args:
        x: input vectors, bfloat16, shape (T, n), n a multiple of 64.
        tiles: weights of the cells in the order of the table, bfloat16, shape (cells, 64, N), N a
            multiple of 64.
        table: the cells of each of J tiles.
        bias: shape (J * N,).
        tiling: how the product is cut.
        programs: that run at once; by default as many as the device has multiprocessors.
        interpret: parameters to run on a CPU instead.

    Returns:
        Bfloat16 from sums in float32, shape (T, J * N).
    """
    tokens, columns = x.shape[0], tiles.shape[-1]
    # Copies are cut into groups of 8 rows, and reach over the end of x in whole groups only.
    x = jnp.pad(x, ((0, -tokens % 8), (0, 0)))
    if programs is None:
        programs = getattr(jax.devices()[0], "core_count", _MULTIPROCESSORS)
    swizzled = plgpu.TilingTransform((8, CELL)), plgpu.SwizzleTransform(128)
    kernel = plgpu.kernel(
        functools.partial(_kernel, tiling=tiling),
        out_type=jax.ShapeDtypeStruct((x.shape[0], len(table.counts) * columns), x.dtype),
        scratch_types={
            "x_ring": plgpu.SMEM((tiling.slots, tiling.rows, CELL), x.dtype, transforms=swizzled),
            "tile_ring": plgpu.SMEM((tiling.slots, CELL, columns), x.dtype, transforms=swizzled),
            "pieces": plgpu.SMEM(
                (_MULTIPLY, tiling.buffers(columns), *_PIECE), x.dtype, transforms=swizzled
            ),
            # A slot is full after two copies, and free when all peers have multiplied it.
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=tiling.slots),
            "free": plgpu.ClusterBarrier(
                collective_axes=("peer",), num_arrivals=_MULTIPLY, num_barriers=tiling.slots
            ),
        },
        grid=(programs // tiling.peers,),
        grid_names=("program",),
        cluster=(tiling.peers,),
        cluster_names=("peer",),
        num_threads=_MULTIPLY + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    work, shares = _schedule(
        pl.cdiv(tokens, tiling.rows * tiling.peers),
        np.array(table.counts),
        programs // tiling.peers,
    )
    starts = np.concatenate([[0], np.cumsum(table.counts)])
    tables = [jnp.asarray(a, jnp.int32) for a in (work, shares, starts, table.cells)]
    return kernel(tables, x, tiles, None if bias is None else bias.astype(jnp.float32))[:tokens]


def _schedule(row_tiles: int, counts: np.ndarray, programs: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares the tiles of the result out among programs.

    Tiles are taken in the order of their tokens, by the program with the least work so far: those
    with the same tokens run at about the same time, and share x in the L2 cache.

    Returns:
        The tiles i * J + j of one program after another, and where each program's begin and end,
        shape (programs + 1,).
    """
    # To write a tile costs about as much as this many cells.
    write = 2
    heavy_first = np.argsort(-counts, kind="stable")
    programs_by_load = [(0, program) for program in range(programs)]
    shares: list[list[int]] = [[] for _ in range(programs)]
    for i in range(row_tiles):
        for j in heavy_first:
            load, program = programs_by_load[0]
            shares[program].append(i * len(counts) + j)
            heapq.heapreplace(programs_by_load, (load + counts[j] + write, program))
    bounds = np.concatenate([[0], np.cumsum([len(share) for share in shares])])
    return np.concatenate(shares), bounds


def _kernel(tables, x, tiles, bias, out, *, x_ring, tile_ring, pieces, full, free, tiling: Tiling):
    work, shares, starts, cells = tables
    rows, slots, peers = tiling
    columns = tiles.shape[-1]
    mine, buffers = rows // _MULTIPLY, tiling.buffers(columns)
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")

    def each_tile(body):
        """Goes through the program's tiles and counts steps, one for each cell.

        The body takes a tile's first row, its j, where its cells begin and end, and the steps
        before it, and returns the steps after it.
        """

        def visit(number, step):
            i, j = jnp.divmod(work[number], jnp.int32(out.shape[1] // columns))
            row = (i * peers + lax.axis_index("peer")) * rows
            return body(row, j, starts[j], starts[j + 1], step)

        return lax.fori_loop(shares[program], shares[program + 1], visit, jnp.int32(0))

    @pl.when(warpgroup == _MULTIPLY)
    def _copy():
        plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

        @each_tile
        def steps(row, j, first, last, step):
            def copy(k, step):
                slot = lax.rem(step, jnp.int32(slots))

                @pl.when(step >= slots)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                window = pl.ds(row, rows), pl.ds(cells[k] * CELL, CELL)
                plgpu.copy_gmem_to_smem(x.at[window], x_ring.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(
                    tiles.at[k], tile_ring.at[slot], full.at[slot], collective_axes="peer"
                )
                return step + 1

            return lax.fori_loop(first, last, copy, step)

        @pl.loop(jnp.maximum(steps - slots, 0), steps)
        def _drain(step):
            plgpu.barrier_wait(free.at[lax.rem(step, jnp.int32(slots))])

    @pl.when(warpgroup < _MULTIPLY)
    def _multiply():
        plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")
        part = pl.ds(warpgroup * mine, mine)

        @each_tile
        def _write(row, j, first, last, step):
            def release(step):
                plgpu.barrier_arrive(free.at[lax.rem(step, jnp.int32(slots))])

            def accumulate(acc):
                def product(k, step):
                    slot = lax.rem(step, jnp.int32(slots))
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.wgmma(acc, x_ring.at[slot, part], tile_ring.at[slot])
                    # One product may go on while the next is started; the one before it is done.
                    plgpu.wgmma_wait(1)
                    pl.when(k > first)(lambda: release(step - 1))
                    return step + 1

                end = lax.fori_loop(first, last, product, step)
                return acc[...], end

            acc, end = pl.run_scoped(accumulate, plgpu.ACC((mine, columns), jnp.float32))
            pl.when(last > first)(lambda: release(end - 1))

            number = 0
            for top in range(0, mine, _PIECE[0]):
                for column in range(0, columns, _PIECE[1]):
                    piece = acc[top : top + _PIECE[0], column : column + _PIECE[1]]
                    at = j * columns + column
                    if bias is not None:
                        added = plgpu.load(  # type: ignore[call-arg]  # before jax 0.11
                            bias.at[pl.ds(at, _PIECE[1])],
                            layout=plgpu.Layout.WGMMA.reduce(0),
                            optimized=False,
                        )
                        piece += lax.broadcast_in_dim(added, _PIECE, [1])
                    # The buffer is free when all but the newest copies have read theirs.
                    buffer = pieces.at[warpgroup, number % buffers]
                    plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
                    buffer[...] = piece.astype(out.dtype)
                    plgpu.commit_smem()
                    place = row + warpgroup * mine + top
                    plgpu.copy_smem_to_gmem(
                        buffer, out.at[pl.ds(place, _PIECE[0]), pl.ds(at, _PIECE[1])]
                    )
                    number += 1
            return end

        plgpu.wait_smem_to_gmem(0)
