"""The picture of a run's curves, drawn without a display, as in `gaudi_jax.report.masks`."""

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogFormatter, MaxNLocator, PercentFormatter

Rows = Sequence[Mapping[str, Any]]

# The palette of Okabe & Ito, which the colour-blind can tell apart.
BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"

#: A training curve of more points is drawn faintly, under its running mean.
MAX_NOISY_POINTS = 60


def plot_curves(
    rows: Rows,
    path: str | PathLike[str],
    *,
    target_of: Literal["mean_width", "relative_multiplications"] = "relative_multiplications",
    unigram_perplexity: float | None = None,
) -> bool:
    """Draws the curves of a run from the rows of its `metrics.jsonl`.

    Panels: loss, accuracy, perplexity, relative multiplications, mean width, sigma, learning rate,
    each against the step; one without a finite value is left out. Thin dotted lines mark where the
    run resumed.

    Args:
        rows: dicts with "step" and any of "train_loss", "validation_loss", "train_accuracy",
            "validation_accuracy", "validation_perplexity", "mean_width", "sigma",
            "relative_multiplications", "target" and "learning_rate"; values are numbers, strings
            such as "inf", or None. Rows without a step are ignored, apart from
            {"resumed_from": step}.
        path: file to write; its suffix chooses the format, such as ".png".
        target_of: the quantity that "target" bounds.
        unigram_perplexity: of the tokens' frequencies alone, on the test split: a dotted line
            beside the perplexity; None for no line.

    Returns:
        Whether a picture was written: False, and no file, if no row has anything to draw.

    Example:
        >>> import tempfile
        >>> from gaudi_jax.report.curves import plot_curves
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_curves([{"step": 1, "train_loss": 2.3}], f"{folder}/curves.png")
        ...     plot_curves([], f"{folder}/none.png")
        True
        False
    """
    panels = [
        drawn
        for panel in _curve_panels(target_of, unigram_perplexity)
        if (drawn := panel._replace(curves=[c for c in panel.curves if _series(rows, c.key)[0]]))
        and any(curve.key != "target" for curve in drawn.curves)
    ]
    if not panels:
        return False
    columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(
        figsize=(4.6 * columns, 3.3 * lines),
        dpi=110,
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
    )
    for index, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(lines, columns, index + 1), panel, rows)
    figure.savefig(path)
    return True


class _Curve(NamedTuple):
    key: str
    label: str
    color: str
    noisy: bool = False
    style: str = "-"


class _Panel(NamedTuple):
    title: str
    curves: list[_Curve]
    decorate: Callable[[Axes], Any]


def _curve_panels(target_of: str, unigram_perplexity: float | None) -> list[_Panel]:
    def percent(axes: Axes) -> None:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))

    def from_zero(axes: Axes) -> None:
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])

    def percent_from_zero(axes: Axes) -> None:
        percent(axes)
        from_zero(axes)

    def short_numbers_from_zero(axes: Axes) -> None:
        axes.yaxis.set_major_formatter("{x:g}")
        from_zero(axes)

    def beside_unigram(axes: Axes) -> None:
        axes.set_yscale("log")  # from hundreds to a few
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        axes.tick_params(which="minor", labelsize=9)
        if unigram_perplexity is not None:
            axes.axhline(unigram_perplexity, color=GREY, linestyle=":", label="unigram, test")

    def train_and_validation(name: str) -> list[_Curve]:
        return [
            _Curve(f"train_{name}", "training", BLUE, noisy=True),
            _Curve(f"validation_{name}", "validation", VERMILLION),
        ]

    def with_target(key: str, label: str) -> list[_Curve]:
        target = [_Curve("target", "target", GREY, style="--")] if key == target_of else []
        return [_Curve(key, label, GREEN), *target]

    return [
        _Panel("Loss", train_and_validation("loss"), lambda axes: None),
        _Panel("Accuracy", train_and_validation("accuracy"), percent),
        _Panel(
            "Perplexity",
            [_Curve("validation_perplexity", "validation", VERMILLION)],
            beside_unigram,
        ),
        _Panel(
            "Multiplications, relative to dense",
            with_target("relative_multiplications", "model"),
            percent_from_zero,
        ),
        _Panel("Mean width of the blocks", with_target("mean_width", "model"), from_zero),
        _Panel("Sharpness of the masks, σ", [_Curve("sigma", "", GREEN)], from_zero),
        _Panel("Learning rate", [_Curve("learning_rate", "", BLUE)], short_numbers_from_zero),
    ]


def _draw_panel(axes: Axes, panel: _Panel, rows: Rows) -> None:
    for curve in panel.curves:
        steps, values = _series(rows, curve.key)
        draw: dict[str, Any] = {
            "color": curve.color,
            "linestyle": curve.style,
            "label": curve.label,
        }
        if curve.noisy and len(steps) > MAX_NOISY_POINTS:
            axes.plot(steps, values, color=curve.color, linewidth=0.7, alpha=0.3)
            axes.plot(steps, _running_mean(values), linewidth=1.8, **draw)
        else:
            marker = "o" if len(steps) <= 30 and curve.style == "-" else None
            axes.plot(steps, values, linewidth=1.8, marker=marker, markersize=3.5, **draw)
    marks = filter(math.isfinite, [_number(row.get("resumed_from")) for row in rows])
    for index, mark in enumerate(marks):
        label = None if index else "resumed"
        axes.axvline(mark, color="black", linewidth=0.9, linestyle=":", zorder=1, label=label)
    panel.decorate(axes)
    axes.set_title(panel.title, fontsize=11, fontweight="bold", loc="left")
    axes.set_xlabel("step", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelsize=9)
    axes.grid(color="#E5E5E5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if any(curve.label for curve in panel.curves):
        axes.legend(fontsize=9, frameon=False)


def _series(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows in which both are finite numbers."""
    pairs = [(_number(row.get("step")), _number(row.get(key))) for row in rows]
    finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
    return [step for step, _ in finite], [value for _, value in finite]


def _number(value: Any) -> float:
    """Reads numbers, strings such as "inf", and None or nonsense as not-a-number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _running_mean(values: Sequence[float]) -> Float[np.ndarray, " n"]:
    """Centred mean over a twentieth of the values; the window shrinks at both ends."""
    window = np.ones(len(values) // 20 | 1)
    counts = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / counts
