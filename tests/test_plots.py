"""Pictures of a run: what is drawn, checked on the figures themselves and on the files."""

import math
import threading

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from flax import nnx
from matplotlib._pylab_helpers import Gcf
from matplotlib.figure import Figure
from PIL import Image

from gaudi_jax.layers import GaudiLinear
from gaudi_jax.report import curves, masks


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, in order; nothing is written."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: saved.append(figure))
    return saved


def ones_layer(widths, locations, n_in, n_out, rank=1, granularity=1):
    """A layer whose evaluation kernel counts the rank-1 terms on each entry."""
    widths, locations = jnp.asarray(widths, jnp.float32), jnp.asarray(locations, jnp.float32)
    blocks = widths.shape[1]
    return GaudiLinear.from_blocks(
        jnp.ones((blocks, rank, n_in)),
        jnp.ones((blocks, rank, n_out)),
        widths,
        locations,
        granularity=granularity,
    )


def random_layer(n_in, n_out, blocks=16, seed=0, **options):
    generator = np.random.default_rng(seed)
    widths = generator.uniform(0, 0.4, (2, blocks))
    # Some blocks are dead by one axis only.
    widths[0, 0] = widths[1, 1] = widths[:, 2] = 0
    return ones_layer(widths, generator.uniform(0, 1, (2, blocks)), n_in, n_out, **options)


def counted(layer):
    layer.eval()
    return np.round(np.asarray(layer.kernel()))


class Pair(nnx.Module):
    def __init__(self, seed):
        self.first = random_layer(8, 16, seed=seed)
        self.second = random_layer(16, 8, seed=seed + 1)
        self.dense = nnx.Linear(8, 8, rngs=nnx.Rngs(0))


class Model(nnx.Module):
    def __init__(self, depth):
        self.blocks = nnx.List([Pair(2 * index) for index in range(depth)])


# --------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("n_in", "n_out", "rank", "granularity"), [(12, 20, 1, 1), (16, 8, 3, 4), (7, 13, 2, 1)]
)
def test_coverage_counts_the_terms_on_each_kernel_entry(n_in, n_out, rank, granularity):
    layer = random_layer(n_in, n_out, rank=rank, granularity=granularity)
    picture = masks._block_picture((), layer)
    np.testing.assert_array_equal(picture.coverage, counted(layer))


def test_large_axes_are_averaged(monkeypatch):
    monkeypatch.setattr(masks, "MAX_PIXELS", 8)
    layer = random_layer(32, 24)
    picture = masks._block_picture((), layer)
    expected = counted(layer).reshape(8, 4, 8, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(picture.coverage, expected, rtol=1e-6)
    assert picture.strip_in.shape == picture.strip_out.shape == (8, 8)


def test_uneven_bins_average_every_column_once(monkeypatch):
    monkeypatch.setattr(masks, "MAX_PIXELS", 4)
    columns = np.arange(10.0)[None]
    # Bins start at 0, 2, 5, 7.
    np.testing.assert_allclose(masks._shrink(columns), [[0.5, 3.0, 5.5, 8.0]])


def test_strips_show_live_blocks_sorted_by_their_cyclic_start():
    # Columns: wraps from 6; starts at 2; starts at 2, shorter; dead by the output axis; whole axis.
    widths = [[0.5, 0.5, 0.25, 0.5, 1.0], [0.25, 0.25, 0.25, 0.0, 0.25]]
    locations = [[0.75, 0.25, 0.25, 0.125, 0.0], [0.75, 0.5, 0.25, 0.0, 0.0]]
    picture = masks._block_picture((), ones_layer(widths, locations, 8, 8))
    expected_in = [
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 1],
    ]
    np.testing.assert_array_equal(picture.strip_in, expected_in)
    np.testing.assert_array_equal(picture.strip_out, np.kron(np.eye(4), [[1, 1]]))
    assert "4 of 5 blocks" in picture.caption


def test_caption_gives_the_relative_cost():
    # One block of 4 + 4 multiplications in an 8x8 kernel.
    picture = masks._block_picture((), ones_layer([[0.5], [0.5]], [[0.0], [0.0]], 8, 8))
    assert picture.caption == "12% of dense, 1 of 1 blocks live"


def test_each_gaudi_layer_has_a_panel_with_its_path(figures):
    assert masks.plot_masks(Model(3), "unused.png")
    (figure,) = figures
    names = [text.get_text().split("\n")[0] for text in figure.texts]
    expected = [f"blocks/{index}/{name}" for index in range(3) for name in ("first", "second")]
    assert [name for name in names if name.startswith("blocks")] == expected
    # Kernel and two strips a layer, and the colour bar.
    assert len(figure.axes) == 3 * len(expected) + 1


def test_panels_share_one_colour_scale_from_zero_to_the_most(figures):
    model = Model(2)
    masks.plot_masks(model, "unused.png")
    kernels = [
        np.asarray(image.get_array())
        for axes in figures[0].axes
        for image in axes.images
        if image.get_cmap().name == "coverage"
    ]
    limits = {
        image.get_clim()
        for axes in figures[0].axes
        for image in axes.images
        if image.get_cmap().name == "coverage"
    }
    assert limits == {(0.0, max(kernel.max() for kernel in kernels))}
    expected = [counted(layer) for pair in model.blocks for layer in (pair.first, pair.second)]
    for kernel, count in zip(kernels, expected, strict=True):
        np.testing.assert_array_equal(kernel, count)


@pytest.mark.parametrize(
    ("paths", "columns"),
    [
        ([("blocks", i, name) for i in range(3) for name in "qkv"], 3),
        ([("layers", i) for i in range(8)], 3),
        ([()], 1),
        ([(name,) for name in "abcd"], 4),
        ([*[("blocks", i, name) for i in range(3) for name in "qkv"], ("head",)], 4),
        ([("layers", i) for i in range(100)], 8),
    ],
)
def test_one_line_of_panels_for_each_repetition(paths, columns):
    assert masks._num_columns(paths) == columns


def test_long_names_lose_their_beginning(figures):
    inner: nnx.Module = random_layer(8, 8)
    for _ in range(5):
        inner = nnx.Dict({"quite_a_long_name": inner})
    masks.plot_masks(inner, "unused.png")
    name = next(t.get_text() for t in figures[0].texts if "long_name" in t.get_text())
    name = name.split("\n")[0]
    assert name.startswith("…")
    assert name.endswith("name/quite_a_long_name")
    assert len(name) == masks.MAX_NAME


def test_a_layer_without_live_blocks_is_blank(figures):
    layer = ones_layer([[0.0, 0.5], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.0]], 8, 8)
    assert masks.plot_masks(layer, "unused.png")
    coverage = figures[0].axes[0].images[0]
    assert not np.asarray(coverage.get_array()).any()
    assert coverage.get_clim() == (0.0, 1.0)


def test_zero_is_white_and_one_among_hundreds_is_not():
    norm = matplotlib.colors.PowerNorm(0.5, vmin=0, vmax=200)
    zero, one = np.asarray(masks._COVERAGE_COLORS(norm([0.0, 1.0])))
    assert tuple(zero) == (1.0, 1.0, 1.0, 1.0)
    assert min(one[:3]) < 0.9


def test_model_without_gaudi_layers_writes_nothing(tmp_path):
    path = tmp_path / "masks.png"
    assert not masks.plot_masks(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), path)
    assert not path.exists()


def test_the_model_is_left_as_it_was(tmp_path):
    model = Model(1)
    before = jax.tree.map(np.asarray, nnx.state(model))
    masks.plot_masks(model, tmp_path / "masks.png")
    after = jax.tree.map(np.asarray, nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert not model.blocks[0].first.deterministic


def test_files_are_written_from_a_thread_and_settings_stay(tmp_path):
    settings = dict(matplotlib.rcParams)
    results = []
    thread = threading.Thread(
        target=lambda: results.extend(
            [
                masks.plot_masks(Model(1), tmp_path / "masks.png"),
                curves.plot_curves(training_rows(5), tmp_path / "curves.png"),
            ]
        )
    )
    thread.start()
    thread.join()
    assert results == [True, True]
    for name in ("masks.png", "curves.png"):
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 8
    assert dict(matplotlib.rcParams) == settings
    # Figures made through pyplot would stay registered, and in memory.
    assert not Gcf.figs


# --------------------------------------------------------------------------------- curves


def training_rows(count, **extra):
    return [
        {
            "step": 10 * (index + 1),
            "train_loss": 2.0 / (index + 1),
            "train_accuracy": index / count,
            "learning_rate": 1e-3,
            "sigma": 1.0 + index,
            "target": 0.3,
            "mean_width": 0.5,
            "relative_multiplications": 0.6,
            "images_per_second": 1e3,
            **extra,
        }
        for index in range(count)
    ]


def validation_row(step):
    return {"step": step, "validation_loss": 1.0, "validation_accuracy": 0.5}


def drawn(figure):
    """{panel title: {line label: (steps, values)}}; unlabelled lines are named by their colour."""
    return {
        axes.get_title(loc="left"): {
            line.get_label() if not line.get_label().startswith("_") else line.get_color(): (
                list(line.get_xdata()),
                list(line.get_ydata()),
            )
            for line in axes.lines
        }
        for axes in figure.axes
    }


def test_curves_of_a_whole_run(figures):
    rows = [*training_rows(3), validation_row(30)]
    assert curves.plot_curves(rows, "unused.png")
    panels = drawn(figures[0])
    assert list(panels) == [
        "Loss",
        "Accuracy",
        "Multiplications, relative to dense",
        "Mean width of the blocks",
        "Sharpness of the masks, σ",
        "Learning rate",
    ]
    assert panels["Loss"] == {
        "training": ([10, 20, 30], [2.0, 1.0, 2 / 3]),
        "validation": ([30], [1.0]),
    }
    assert panels["Multiplications, relative to dense"] == {
        "model": ([10, 20, 30], [0.6] * 3),
        "target": ([10, 20, 30], [0.3] * 3),
    }
    assert list(panels["Mean width of the blocks"]) == ["model"]
    assert {axes.get_xlabel() for axes in figures[0].axes} == {"step"}


def test_target_of_the_mean_width(figures):
    curves.plot_curves(training_rows(3), "unused.png", target_of="mean_width")
    panels = drawn(figures[0])
    assert list(panels["Mean width of the blocks"]) == ["model", "target"]
    assert list(panels["Multiplications, relative to dense"]) == ["model"]


@pytest.mark.parametrize("infinite", ["inf", math.inf, None, "nonsense", math.nan])
def test_values_that_cannot_be_drawn_are_left_out(figures, infinite):
    rows = training_rows(3)
    rows[1]["sigma"] = infinite
    curves.plot_curves(rows, "unused.png")
    ((steps, values),) = drawn(figures[0])["Sharpness of the masks, σ"].values()
    assert (steps, values) == ([10, 30], [1.0, 3.0])
    curves.plot_curves(training_rows(3, sigma=infinite), "unused.png")
    assert "Sharpness of the masks, σ" not in drawn(figures[1])


def test_only_evaluation_rows(figures):
    curves.plot_curves([validation_row(10), validation_row(20)], "unused.png")
    panels = drawn(figures[0])
    assert list(panels) == ["Loss", "Accuracy"]
    assert panels["Accuracy"] == {"validation": ([10, 20], [0.5, 0.5])}


def test_dense_run_has_no_panels_of_structure(figures):
    structure = {"sigma", "mean_width", "relative_multiplications"}
    # A target alone does not make a panel.
    rows = [{k: v for k, v in row.items() if k not in structure} for row in training_rows(2)]
    curves.plot_curves(rows, "unused.png")
    assert list(drawn(figures[0])) == ["Loss", "Accuracy", "Learning rate"]


def test_a_run_of_text_has_its_perplexity_beside_that_of_the_tokens_frequencies(figures):
    rows = [{"step": step, "validation_perplexity": 900.0 / step} for step in (10, 20)]
    curves.plot_curves(rows, "unused.png", unigram_perplexity=202.0)
    assert drawn(figures[0]) == {
        "Perplexity": {
            "validation": ([10, 20], [90.0, 45.0]),
            "unigram, test": ([0, 1], [202.0] * 2),
        }
    }
    (axes,) = figures[0].axes
    assert axes.lines[1].get_linestyle() == ":"
    assert axes.get_ylim()[0] < 45 < 202 < axes.get_ylim()[1]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["validation", "unigram, test"]
    curves.plot_curves(rows, "unused.png")
    assert list(drawn(figures[1])["Perplexity"]) == ["validation"]
    # The line alone makes no panel.
    assert not curves.plot_curves([{"step": 1}], "unused.png", unigram_perplexity=202.0)


def test_a_single_row_is_a_visible_point(figures):
    curves.plot_curves(training_rows(1), "unused.png")
    assert all(axes.lines[0].get_marker() == "o" for axes in figures[0].axes)


def test_resumed_runs_are_marked_in_every_panel(figures):
    rows = [*training_rows(2), {"resumed_from": 20}, validation_row(30), {"resumed_from": 30}]
    curves.plot_curves(rows, "unused.png")
    for axes in figures[0].axes:
        marks = [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == ":"]
        assert marks == [[20, 20], [30, 30]]
    labels = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert labels == ["training", "validation", "resumed"]


def test_noisy_curves_get_a_running_mean(figures):
    count = curves.MAX_NOISY_POINTS + 1
    rows = training_rows(count)
    for index, row in enumerate(rows):
        row["train_loss"] = 1.0 + (-1.0) ** index
    curves.plot_curves(rows, "unused.png")
    faint, mean = figures[0].axes[0].lines
    assert list(faint.get_ydata()) == [row["train_loss"] for row in rows]
    assert faint.get_alpha() < 0.5
    # Means over 3 of 0, 2, 0, 2, ...; over 2 at the ends.
    np.testing.assert_allclose(mean.get_ydata()[[0, -1]], 1.0)
    np.testing.assert_allclose(mean.get_ydata()[1:3], [4 / 3, 2 / 3])
    assert len(figures[0].axes[-1].lines) == 1


def test_running_mean_keeps_a_constant():
    np.testing.assert_allclose(curves._running_mean([3.0] * 101), 3.0)


@pytest.mark.parametrize(
    "rows",
    [[], [{"resumed_from": 3}], [{"step": 1}], [{"train_loss": 1.0}], [{"step": 1, "target": 1}]],
)
def test_nothing_to_draw_writes_nothing(tmp_path, rows):
    path = tmp_path / "curves.png"
    assert not curves.plot_curves(rows, path)
    assert not path.exists()
