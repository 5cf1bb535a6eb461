"""The picture of a model's masks: where the blocks of each layer lie.

Figures are built on `matplotlib.figure.Figure` alone: no display, no pyplot state, so that they can
be drawn in any thread and leave the caller's matplotlib settings as they are.
"""

import math
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from gaudi_jax.layers import GaudiLinear
from gaudi_jax.masks import hard_mask
from gaudi_jax.report.curves import GREY

# White is kept for "no block", and the first colour differs clearly from it.
_COVERAGE_COLORS = LinearSegmentedColormap.from_list(
    "coverage", ["white", *colormaps["magma_r"](np.linspace(0.08, 0.95, 16))]
)

#: Axes longer than this are averaged down in the pictures of masks; a panel is not larger on paper.
MAX_PIXELS = 96
#: Longer layer names lose their beginning: what fits over a panel.
MAX_NAME = 40


def plot_masks(model: nnx.Module, path: str | PathLike[str]) -> bool:
    """Draws where the blocks of every GaudiLinear lie, from their exact (hard) masks.

    Each layer's panel shows how many rank-1 terms lie on each kernel entry, input axis down and
    output axis across. The strips along its edges show the live blocks' intervals on that axis, one
    line a block, sorted by where they start. Dead blocks are left out; axes longer than
    `MAX_PIXELS` are averaged down.

    Args:
        model: any NNX module.
        path: file to write; its suffix chooses the format, such as ".png".

    Returns:
        Whether a picture was written: False, and no file, if the model has no GaudiLinear.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> from gaudi_jax import GaudiLinear
        >>> from gaudi_jax.report.masks import plot_masks
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_masks(GaudiLinear(8, 8, rngs=nnx.Rngs(0)), f"{folder}/masks.png")
        ...     plot_masks(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), f"{folder}/none.png")
        True
        False
    """
    layers = [
        _block_picture(parts, module)
        for parts, module in nnx.iter_modules(model)
        if isinstance(module, GaudiLinear)
    ]
    if not layers:
        return False
    columns = _num_columns([layer.parts for layer in layers])
    rows = math.ceil(len(layers) / columns)
    # Margins in inches: they stay the same however many panels there are.
    panel = 2.7 if columns > 1 else 4.8
    left, right, top, bottom = 0.45, 0.95, 1.2, 0.4
    width, height = left + right + columns * panel, top + bottom + rows * panel
    figure = Figure(figsize=(width, height), dpi=90)
    grid = figure.add_gridspec(
        rows,
        columns,
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=0.18,
        hspace=0.36,
    )
    # At least 1, so that a model whose blocks are all dead still has a scale.
    highest = max(1.0, *(layer.coverage.max() for layer in layers))
    norm = PowerNorm(0.5, vmin=0, vmax=highest)
    for index, layer in enumerate(layers):
        image = _draw_blocks(figure, grid[divmod(index, columns)], layer, norm)

    scale_height = min(rows * panel * 0.9, 4.5)
    scale = figure.add_axes(
        (
            1 - 0.75 / width,
            1 - (top + scale_height) / height,
            0.16 / width,
            scale_height / height,
        )
    )
    ticks = [t for t in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if t <= highest]
    bar = figure.colorbar(image, cax=scale, ticks=ticks)
    bar.ax.set_yticklabels([str(tick) for tick in ticks], fontsize=9)
    bar.ax.minorticks_off()
    bar.set_label("rank-1 terms on a kernel entry", fontsize=9)
    figure.text(
        left / width,
        1 - 0.2 / height,
        "Where the blocks of each layer lie",
        fontsize=13,
        fontweight="bold",
        va="top",
    )
    figure.text(
        left / width,
        1 - 0.46 / height,
        "Input features down, output features across; strips: each block's interval.",
        fontsize=9,
        color=GREY,
        va="top",
    )
    figure.savefig(path)
    return True


class _BlockPicture(NamedTuple):
    """What is drawn of one layer: images of at most MAX_PIXELS a side."""

    parts: tuple[Any, ...]
    caption: str
    features: tuple[int, int]
    coverage: Float[np.ndarray, "y x"]
    strip_in: Float[np.ndarray, "live y"]
    strip_out: Float[np.ndarray, "live x"]


def _block_picture(parts: tuple[Any, ...], layer: GaudiLinear) -> _BlockPicture:
    features = (layer.in_features, layer.out_features)
    masks = [
        np.asarray(
            hard_mask(
                layer.widths[axis],
                layer.locations[axis],
                size,
                granularity=layer.granularity[axis],
            ),
            np.float32,
        )
        for axis, size in enumerate(features)
    ]
    live = masks[0].any(axis=1) & masks[1].any(axis=1)
    # Averaging each axis first gives the same picture as averaging the full-size product.
    small_in, small_out = (_shrink(mask[live]) for mask in masks)
    relative = float(layer.multiplications()) / math.prod(features)
    return _BlockPicture(
        parts,
        f"{relative:.0%} of dense, {live.sum()} of {live.size} blocks live",
        features,
        layer.rank * small_in.T @ small_out,
        _strip(masks[0][live]),
        _strip(masks[1][live]),
    )


def _shrink(image: Float[np.ndarray, "rows n"]) -> Float[np.ndarray, "rows pixels"]:
    """Averages the columns over at most MAX_PIXELS bins of nearly equal size."""
    n = image.shape[1]
    if n <= MAX_PIXELS:
        return image
    edges = np.arange(MAX_PIXELS) * n // MAX_PIXELS
    return np.add.reduceat(image, edges, axis=1) / np.diff(edges, append=n)


def _strip(masks: Float[np.ndarray, "live n"]) -> Float[np.ndarray, "lines pixels"]:
    """Intervals one above the other, sorted by where they start (cyclically), then by length."""
    rising = masks > np.roll(masks, 1, axis=1)
    order = np.lexsort((masks.sum(axis=1), rising.argmax(axis=1)))
    return _shrink(_shrink(masks[order]).T).T


def _num_columns(paths: list[tuple[Any, ...]]) -> int:
    """One row for each repetition of the model's pattern of layers, if it has one."""
    kinds = len({tuple(part for part in path if not isinstance(part, int)) for path in paths})
    if 2 <= kinds <= 8 and len(paths) % kinds == 0:
        return kinds
    return min(math.ceil(math.sqrt(len(paths))), 8)


def _draw_blocks(figure: Figure, cell: SubplotSpec, layer: _BlockPicture, norm: Normalize) -> Any:
    """Draws one layer's panel; returns the image of its kernel, for the colour bar."""
    inner = cell.subgridspec(
        2, 2, width_ratios=(1, 5), height_ratios=(1, 5), wspace=0.05, hspace=0.05
    )
    kernel, side, above = (figure.add_subplot(inner[place]) for place in ((1, 1), (1, 0), (0, 1)))
    n_in, n_out = layer.features
    common: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}
    image = kernel.imshow(
        layer.coverage, cmap=_COVERAGE_COLORS, norm=norm, extent=(0, n_out, n_in, 0), **common
    )
    strips: dict[str, Any] = {"cmap": "Blues", "vmin": 0, "vmax": 1.3, **common}
    if layer.strip_in.size:
        above.imshow(layer.strip_out, extent=(0, n_out, 1, 0), **strips)
        side.imshow(layer.strip_in.T, extent=(0, 1, n_in, 0), **strips)
    for axes in (kernel, side, above):
        axes.set(xticks=[], yticks=[])
        axes.tick_params(labelsize=7, length=2, pad=1, color=GREY)
        axes.spines[:].set(linewidth=0.6, color="#B0B0B0")
    side.set(ylim=(n_in, 0), yticks=[0, n_in])
    kernel.set_xticks([0, n_out], ["0", str(n_out)])
    # Inside the panel's edges, away from the neighbours' labels.
    first, last = kernel.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    name = "/".join(map(str, layer.parts)) or GaudiLinear.__name__
    name = name if len(name) <= MAX_NAME else "…" + name[1 - MAX_NAME :]
    figure.text(
        side.get_position().x0,
        above.get_position().y1,
        f"{name}\n{layer.caption}\n",
        fontsize=8,
        linespacing=1.25,
        va="baseline",
    )
    return image
