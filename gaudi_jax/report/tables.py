"""The readable text of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate


def summary_table(summary: Mapping[str, Any]) -> str:
    """Writes the summary of a run as text: what was run, its results, and the cost of each layer.

    Args:
        summary: the content of a run's `summary.json`. Keys that are missing or None are left out
            of the text. Accuracies and relative costs are fractions, losses are in nats,
            `replaced_utf8` is a number of places, `versions` maps packages to versions, `samples`
            is a list of mappings with "prompt" and "continuation", and `layers` is a list of
            mappings with "path", "kind", "in_features", "out_features", "multiplications" and
            "relative", and "applications" if a layer is applied more than once.

    Returns:
        The text, without a newline at its end; empty for an empty summary.

    Example:
        >>> from gaudi_jax.report.tables import summary_table
        >>> print(summary_table({
        ...     "data": "digits", "seed": 0, "test_accuracy_hard": 0.975, "layers": [
        ...         {"path": "head", "kind": "Linear", "in_features": 64, "out_features": 10,
        ...          "multiplications": 640, "relative": 1.0}]}))
        Data                       digits
        Seed                       0
        Test accuracy, hard masks  97.50 %
        <BLANKLINE>
        Layer    Kind    In → out      Multiplications    Relative
        -------  ------  ----------  -----------------  ----------
        head     Linear  64 → 10                   640     100.0 %
    """
    header = [(label, text) for label, text in _header(summary) if text]
    parts = [
        tabulate(header, tablefmt="plain", disable_numparse=True),
        _layer_table(summary.get("layers") or []),
        *(
            f"Sample {number}\n{sample['prompt']} […] {sample['continuation']}"
            for number, sample in enumerate(summary.get("samples") or [], start=1)
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def _header(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    get = summary.get
    versions = get("versions") or {}
    return [
        ("Data", _text(get("data"))),
        ("Places that are no UTF-8", _count(get("replaced_utf8") or None)),
        ("Seed", _text(get("seed"))),
        ("Steps", _count(get("steps"))),
        ("Device", _text(get("device"))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Test accuracy, soft masks", _percent(get("test_accuracy_soft"), 2)),
        ("Test accuracy, hard masks", _percent(get("test_accuracy_hard"), 2)),
        ("Test accuracy, packed", _percent(get("test_accuracy_packed"), 2)),
        ("Validation accuracy", _percent(get("validation_accuracy"), 2)),
        *(
            (f"{label}, {split} accuracy", _percent(get(f"{name}_{split}_accuracy"), 2))
            for name, label, split in _compression(summary)
        ),
        *_text_results(summary),
        ("Multiplications", _count(get("multiplications"))),
        ("Multiplications if dense", _count(get("dense_multiplications"))),
        ("Relative multiplications", _percent(get("relative_multiplications"), 1)),
        ("Relative multiplications, packed", _percent(get("packed_relative_multiplications"), 1)),
        ("Parameters", _count(get("parameters"))),
        ("Seconds of compression", _count(get("compress_seconds"))),
    ]


def _compression(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Names and labels of what was measured before and after compression, and on which split."""
    split = "test" if "dense_test_loss" in summary else "validation"
    return [("dense", "Dense model", split), ("compressed", "Compressed, before training", split)]


def _text_results(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of a language model; its rows are told by the perplexity, which image models lack."""
    if "validation_perplexity" not in summary:
        return []
    rows = [
        ("Test, soft masks", "test_{}_soft"),
        ("Test, hard masks", "test_{}_hard"),
        ("Test, packed", "test_{}_packed"),
        ("Validation", "validation_{}"),
        *(
            (f"{label}, {split}", f"{name}_{split}_{{}}")
            for name, label, split in _compression(summary)
        ),
    ]
    names = {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits a byte"}
    names["word_perplexity"] = "word perplexity"
    texts = [
        (
            label,
            ", ".join(
                f"{text} {_number(summary[key])}"
                for name, text in names.items()
                if (key := form.format(name)) in summary
            ),
        )
        for label, form in rows
    ]
    unigram = summary.get("unigram_perplexity")
    return [*texts, ("Unigram perplexity", "" if unigram is None else _number(unigram))]


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    if not layers:
        return ""
    columns = {
        "Layer": [_text(layer.get("path")) for layer in layers],
        "Kind": [_text(layer.get("kind")) for layer in layers],
        "In → out": [
            f"{layer.get('in_features')} → {layer.get('out_features')}" for layer in layers
        ],
        "Applied": [_count(layer.get("applications")) for layer in layers],
        "Multiplications": [_count(layer.get("multiplications")) for layer in layers],
        "Relative": [_percent(layer.get("relative"), 1) for layer in layers],
    }
    if set(columns["Applied"]) <= {"", "1"}:
        del columns["Applied"]
    left = {"Layer", "Kind", "In → out"}
    return tabulate(
        columns,
        headers="keys",
        colalign=["left" if name in left else "right" for name in columns],
        disable_numparse=True,
    )


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _count(value: float | None) -> str:
    return "" if value is None else f"{round(value):,}"


def _number(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _percent(fraction: float | None, digits: int) -> str:
    return "" if fraction is None else f"{100 * fraction:.{digits}f} %"
