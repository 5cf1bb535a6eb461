"""The readable text of a run."""

import pytest

from gaudi_jax.report.tables import summary_table

LAYERS = [
    {
        "path": "blocks.0.mlp.fc1",
        "kind": "GaudiLinear",
        "in_features": 64,
        "out_features": 256,
        "applications": 1,
        "multiplications": 4915.0,
        "dense_multiplications": 16384,
        "relative": 4915 / 16384,
    },
    {
        "path": "head",
        "kind": "Linear",
        "in_features": 64,
        "out_features": 10,
        "applications": 1,
        "multiplications": 640,
        "dense_multiplications": 640,
        "relative": 1.0,
    },
]

SUMMARY = {
    "data": "digits",
    "seed": 1000,
    "steps": 3000,
    "device": "cpu x1",
    "versions": {"python": "3.11.9", "jax": "0.10.2"},
    "test_accuracy_soft": 0.96941,
    "test_accuracy_hard": 0.0,
    "validation_accuracy": 1.0,
    "multiplications": 5555.0,
    "dense_multiplications": 17024,
    "relative_multiplications": 5555 / 17024,
    "parameters": 310222,
    "layers": LAYERS,
}


def test_the_whole_text():
    assert summary_table(SUMMARY).splitlines() == [
        "Data                       digits",
        "Seed                       1000",
        "Steps                      3,000",
        "Device                     cpu x1",
        "Versions                   python 3.11.9, jax 0.10.2",
        "Test accuracy, soft masks  96.94 %",
        "Test accuracy, hard masks  0.00 %",
        "Validation accuracy        100.00 %",
        "Multiplications            5,555",
        "Multiplications if dense   17,024",
        "Relative multiplications   32.6 %",
        "Parameters                 310,222",
        "",
        "Layer             Kind         In → out      Multiplications    Relative",
        "----------------  -----------  ----------  -----------------  ----------",
        "blocks.0.mlp.fc1  GaudiLinear  64 → 256                4,915      30.0 %",
        "head              Linear       64 → 10                   640     100.0 %",
    ]


@pytest.mark.parametrize("key", sorted(SUMMARY.keys() - {"layers"}))
def test_missing_keys_are_left_out(key):
    whole = summary_table(SUMMARY).splitlines()
    without = summary_table({k: v for k, v in SUMMARY.items() if k != key})
    assert summary_table(SUMMARY | {key: None}) == without
    # Widths of columns may shrink with the line that went.
    rest = [line.split() for line in without.splitlines()]
    assert len(rest) == len(whole) - 1
    assert all(line in [whole_line.split() for whole_line in whole] for line in rest)


@pytest.mark.parametrize("layers", [None, []])
def test_without_layers_only_the_header(layers):
    text = summary_table(SUMMARY | {"layers": layers})
    assert text.splitlines() == summary_table(SUMMARY).splitlines()[:12]


def test_only_layers():
    text = summary_table({"layers": LAYERS})
    assert text.splitlines() == summary_table(SUMMARY).splitlines()[13:]


def test_empty_summary():
    assert summary_table({}) == ""


def test_replaced_bytes_of_a_text_are_told_where_there_are_any():
    assert summary_table(SUMMARY | {"replaced_utf8": 0}) == summary_table(SUMMARY)
    lines = summary_table(SUMMARY | {"replaced_utf8": 1234}).splitlines()
    assert lines[1] == "Places that are no UTF-8   1,234"


def test_repeated_applications_get_a_column():
    layers = [LAYERS[0] | {"applications": 17}, LAYERS[1]]
    lines = summary_table({"layers": layers}).splitlines()
    assert lines[0].split("  ")[-1].strip() == "Relative"
    assert "Applied" in lines[0]
    assert lines[2].split() == [
        "blocks.0.mlp.fc1", "GaudiLinear", "64", "→", "256", "17", "4,915", "30.0", "%",
    ]  # fmt: skip


def test_layer_without_relative_cost_leaves_the_cell_empty():
    layer = {key: value for key, value in LAYERS[1].items() if key != "relative"}
    last = summary_table({"layers": [LAYERS[0], layer]}).splitlines()[-1]
    assert last.split() == ["head", "Linear", "64", "→", "10", "640"]
