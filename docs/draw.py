"""Draws pictures of the documentation with the library itself: ``python docs/draw.py``."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from ml_collections import ConfigDict

import gaudi_jax
from gaudi_jax.data.pipeline import first_batches
from gaudi_jax.decomposition import relative_error, svd_factors
from gaudi_jax.masks import gaudi_mask, hard_mask
from gaudi_jax.training.tasks import open_task
from gaudi_jax.training.workdir import read_config
from gaudi_jax.zoo import MODELS

PICTURES = Path(__file__).parent / "pictures"
#: Of a transformer block, in `draw_before_and_after`.
LAYERS = ("attention/qkv", "attention/out", "mlp/fc1", "mlp/fc2")


def new_figure(columns: int, height: float = 2.9) -> tuple[Figure, np.ndarray]:
    """A row of panels."""
    figure = Figure(figsize=(3.1 * columns, height), dpi=110, layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, columns))


def draw_masks() -> None:
    """One interval: its mask by sigma, and the derivatives that move its edges."""
    n, width, location = 64, jnp.array([0.375]), jnp.array([0.25])
    figure, (values, gradients) = new_figure(2)
    for sigma in (2.0, 8.0, 32.0, float("inf")):
        mask = gaudi_mask(width, location, n, sigma=sigma)[0]
        values.plot(mask, label=f"σ = {sigma:g}".replace("inf", "∞"))
    for smoothing in (0.0, 1.0, 2.0):

        def mask_of(w: Array, smoothing: float = smoothing) -> Array:
            return gaudi_mask(w, location, n, backward_smoothing=smoothing)[0]

        slope = jax.jacrev(mask_of)(width)[:, 0] / n
        gradients.plot(slope, label=f"smoothed over {smoothing:g} cells")
    values.set(title="the mask", xlabel="feature")
    gradients.set(title="its derivative by the width, σ = ∞", xlabel="feature")
    for axes in (values, gradients):
        axes.legend(fontsize=7)
    figure.savefig(PICTURES / "method_masks.png")


def draw_structures() -> None:
    """Special cases at a quarter of the cost of 64 x 64, as widths and locations."""
    n, key = 64, jax.random.key(0)
    steps = jnp.arange(4) / 4
    corners = jnp.stack(jnp.meshgrid(steps, steps)).reshape(2, -1)
    kinds = {
        "low rank: 8 blocks of full width": (jnp.ones((2, 8)), jnp.zeros((2, 8))),
        "Monarch: a grid of rank 2": (
            jnp.full((2, 32), 0.25),
            jnp.repeat(corners, 2, axis=1),
        ),
        "block-diagonal: rank 8 each": (
            jnp.full((2, 32), 0.25),
            jnp.tile(jnp.repeat(steps, 8), (2, 1)),
        ),
        "anything else": (
            jnp.clip(jax.random.normal(key, (2, 32)) * 0.12 + 0.25, 0.1, 0.5),
            jax.random.uniform(jax.random.fold_in(key, 1), (2, 32)),
        ),
    }
    figure, panels = new_figure(len(kinds))
    for axes, (name, (widths, locations)) in zip(panels, kinds.items(), strict=True):
        m_in, m_out = (hard_mask(widths[i], locations[i], n) for i in range(2))
        cost = float((m_in.sum(1) + m_out.sum(1)).sum()) / n**2
        axes.imshow(m_in.T @ m_out, cmap="magma_r", vmin=0, vmax=10)
        axes.set(title=f"{name}\n{cost:.2f} of the multiplications", xticks=[], yticks=[])
        axes.title.set_fontsize(9)
    figure.savefig(PICTURES / "method_structures.png")


def planted_kernel(n: int = 128, blocks: int = 12, rank: int = 3) -> Array:
    """Blocks of low rank in random places, and noise."""
    rng = np.random.default_rng(3)
    kernel = np.zeros((n, n))
    for _ in range(blocks):
        (a, b), (rows, columns) = rng.integers(12, 40, 2), rng.integers(0, n, 2)
        content = rng.normal(size=(a, rank)) @ rng.normal(size=(rank, b))
        rows, columns = (rows + np.arange(a)) % n, (columns + np.arange(b)) % n
        kernel[np.ix_(rows, columns)] += content
    noise = rng.normal(size=(n, n))
    kernel += 0.02 * noise * np.linalg.norm(kernel) / np.linalg.norm(noise)
    return jnp.asarray(kernel, jnp.float32)


def draw_search() -> None:
    """A kernel with structure, what the truncated SVD keeps of it, and what the search finds."""
    kernel, budget = planted_kernel(), 0.14
    n, m = kernel.shape
    left, right = svd_factors(kernel, int(budget * n * m / (n + m)))
    found = gaudi_jax.decompose(kernel, budget)
    m_in, m_out = (
        hard_mask(found.widths[i], found.locations[i], size) for i, size in enumerate((n, m))
    )
    pictures = {
        "the kernel": (kernel, None),
        "truncated SVD": (left.T @ right, left.T @ right),
        "blocks by search": (found.kernel(), found.kernel()),
        "where the blocks lie": (m_in.T @ m_out * found.v.shape[1], None),
    }
    figure, panels = new_figure(len(pictures))
    for axes, (name, (picture, approximation)) in zip(panels, pictures.items(), strict=True):
        if name.startswith("where"):
            axes.imshow(picture, cmap="magma_r")
        else:
            limit = float(jnp.abs(kernel).max()) / 2
            axes.imshow(picture, cmap="RdBu", vmin=-limit, vmax=limit)
        if approximation is not None:
            name += f"\nerror {float(relative_error(kernel, approximation)):.2f}"
        axes.set(title=name, xticks=[], yticks=[])
        axes.title.set_fontsize(9)
    figure.savefig(PICTURES / "method_search.png")


def draw_before_and_after() -> None:
    """Trained dense kernels, and the blocks that calibrated compression puts in their place."""
    folder = MODELS / "docs-gpt-dense"
    task = open_task(ConfigDict(read_config(folder)))
    batches = (batch["tokens"][:, :-1] for batch in first_batches(task.train_batches(), 16))
    model = gaudi_jax.load(folder)
    paths = [f"blocks/1/{layer}" for layer in LAYERS]
    rules = [gaudi_jax.Rule("blocks/.*")]
    small = gaudi_jax.compress(
        model, 0.125, rules=rules, allocation="global", calibration=batches, progress=False
    ).model
    figure = Figure(figsize=(3.1 * len(paths), 6.2), dpi=65, layout="constrained")
    panels = figure.subplots(2, len(paths))
    layers = [dict(nnx.iter_graph(each)) for each in (model, small)]
    for (before, after), path in zip(panels.T, paths, strict=True):
        place = tuple(int(part) if part.isdigit() else part for part in path.split("/"))
        dense, found = (each[place] for each in layers)
        kernel = np.abs(dense.kernel[...])
        before.imshow(kernel, cmap="magma_r", vmax=np.quantile(kernel, 0.99), aspect="auto")
        before.set_title(f"{path}\nmagnitudes", fontsize=9)
        m_in, m_out = (
            hard_mask(found.widths[i], found.locations[i], size)
            for i, size in enumerate(kernel.shape)
        )
        after.imshow(m_in.T @ m_out, cmap="magma_r", vmin=0, vmax=10, aspect="auto")
        cost = int(found.multiplications()) / kernel.size
        after.set_title(f"blocks at {cost:.2f} of the multiplications", fontsize=9)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    figure.savefig(PICTURES / "learning_before_and_after.png")


if __name__ == "__main__":
    draw_masks()
    draw_structures()
    draw_search()
    draw_before_and_after()
