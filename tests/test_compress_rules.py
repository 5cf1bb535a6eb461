"""Rules, budgets and how they are shared out."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from other_models import WIDTH, tokens

import gaudi_jax
from gaudi_jax import GaudiLinear, LowRankLinear, Rule
from gaudi_jax.compression.allocation import Curve, share_out
from gaudi_jax.compression.rules import as_rules
from gaudi_jax.errors import UserError


def network(*sizes):
    rngs = nnx.Rngs(0)
    pairs = itertools.pairwise(sizes)
    return nnx.Sequential(*[nnx.Linear(n, m, rngs=rngs) for n, m in pairs])


def compress(model, budget, **options):
    return gaudi_jax.compress(model, budget, **{"method": "low_rank", "progress": False} | options)


def test_the_first_rule_that_matches_the_whole_path_holds():
    rules = [
        {"pattern": "layers/0", "budget": 0.5},
        Rule("layers/[01]", budget=0.25),
        ConfigDict({"pattern": "layers/2", "method": "gaudi", "granularity": [12, 5]}),
        Rule("layers/[0-2]", method="skip"),
        Rule("layers/3", method="skip"),
    ]
    model = network(*[WIDTH] * 6)
    with pytest.raises(UserError, match=r"rule 'layers/\[0-2\]' holds for no layer"):
        compress(model, 0.5, rules=rules)
    del rules[3]
    small, plan = compress(model, 0.5, rules=rules, rounds=2)
    entries = plan["layers"]
    assert [entries[f"layers/{i}"]["multiplications"] for i in (0, 1)] == [128, 64]
    assert entries["layers/2"]["method"] == "gaudi"
    assert entries["layers/2"]["granularity"] == [8, 4]
    assert small.layers[2].granularity == (8, 4)
    assert plan["left"] == {"layers/3": "a rule skips it", "layers/4": "no rule matches it"}
    assert type(small.layers[3]) is nnx.Linear
    assert type(small.layers[0]) is LowRankLinear
    assert plan["dense_multiplications"] == 3 * WIDTH**2


def test_rules_may_stand_in_place_of_the_budget():
    model = network(WIDTH, WIDTH, WIDTH)
    rules = [Rule("layers/0", budget=0.5), Rule("layers/1", method="skip")]
    assert compress(model, rules).plan["multiplications"] == 128
    with pytest.raises(UserError, match="rule 'layers/0' has no budget"):
        compress(model, [Rule("layers/0")])
    with pytest.raises(UserError, match="give rules once"):
        compress(model, rules, rules=rules)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"pattern": "layers/("}, "no regular expression"),
        ({"pattern": "a", "mode": "skip"}, "no field 'mode'; its fields are pattern, method"),
        ({"method": "skip"}, "has no pattern"),
        ("layers", "is no rule"),
        ({"pattern": "a", "method": "svd"}, "unknown method 'svd'"),
        ({"pattern": "a", "budget": 0}, "budget=0 must be a positive fraction"),
        ({"pattern": "a", "budget": float("nan")}, "budget=nan must be"),
        ({"pattern": "a", "budget": "half"}, "budget='half' of a rule must be a number"),
        ({"pattern": "a", "granularity": ("1", 2)}, "granularity=.* must be a number"),
        ({"pattern": "a", "rank": (1, 2)}, r"rank=\(1, 2\) of a rule must be a number"),
        ({"pattern": "a", "rank": 0}, "rank=0 must be"),
        ({"pattern": "a", "granularity": (1, 2, 3)}, "granularity=.* must be"),
        ({"pattern": "a", "granularity": 1.5}, "granularity=1.5 must be"),
    ],
)
def test_bad_rules_are_named(rule, message):
    with pytest.raises(UserError, match=message):
        as_rules([rule])


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (0, {}, "budget=0.0 must be a positive fraction"),
        (-1, {}, "budget=-1.0 must be"),
        ("0.3", {}, "budget='0.3' must be a fraction such as 0.3, or a list of rules"),
        (0.1, {}, "budget=0.1 of layer 'layers/0' is less than 0.125, the least"),
        (0.2, {"method": "gaudi", "granularity": 16}, "budget=0.2 of layer 'layers/2'"),
        (0.1, {"allocation": "global"}, "budget=0.1 is less than .*3 layers together"),
        (0.5, {"allocation": "best"}, "unknown allocation 'best'"),
        (0.5, {"allocation": "global", "floor": 1.5}, r"floor=1.5 is outside \[0, 1\]"),
        (0.5, {"floor": 0.5}, "floor=0.5 has no effect"),
        (0.5, {"method": "gaudi", "rank": 5}, "rank=5 is too large for layer 'layers/2' of 16x4"),
        (0.5, {"method": "skip"}, r"no layer .* \(layers/0: a rule skips it, .*give a model with"),
        ([Rule(".*", budget=0.5)], {"allocation": "global"}, "allocation='global' has no layer"),
        (
            0.5,
            {"method": "low_rank", "rank": 2},
            "rank=2 has no effect on method='low_rank'; leave",
        ),
        (0.5, {"method": "monarch", "granularity": 4}, "granularity=4 has no effect on"),
        (
            0.5,
            {"blocks": 4},
            "blocks=4 has no effect on method='low_rank'; .* take 'spread' or 'monarch'",
        ),
        (0.5, {"rules": [Rule(".*", "blast", rank=2)]}, "rank=2 has no effect on method='blast'"),
        (0.5, {"calibration": []}, "calibration has no batches"),
        (0.5, {"calibration": [jnp.ones((1, 5))]}, "Sequential cannot be run .*1, 5"),
    ],
)
def test_impossible_calls_are_named_before_any_work(budget, options, message, monkeypatch):
    monkeypatch.setattr("gaudi_jax.compression.layer.svd_factors", None)
    monkeypatch.setattr("gaudi_jax.compression.layer.decompose", None)
    with pytest.raises(UserError, match=message):
        compress(network(WIDTH, WIDTH, WIDTH, 4), budget, **options)


def test_bad_models_are_named():
    with pytest.raises(UserError, match="needs an NNX module, not 'dict'"):
        compress({}, 0.5)
    with pytest.raises(UserError, match=r"no layer .*\(it has none\)"):
        compress(nnx.Sequential(nnx.relu), 0.5)
    with pytest.raises(UserError, match="'layers/0' holds shapes without values"):
        compress(nnx.eval_shape(lambda: network(4, 4)), 0.5)
    model = network(WIDTH, WIDTH)
    model.layers[0].kernel[0, 0] = jnp.nan
    with pytest.raises(UserError, match="the kernel of layer 'layers/0' holds NaN"):
        compress(model, 0.5)


def test_granularity_is_the_largest_divisor_of_each_axis():
    model = network(WIDTH, WIDTH)
    _, plan = compress(model, 0.9, method="gaudi", granularity=(12, 5), rounds=2)
    assert plan["layers"]["layers/0"]["granularity"] == [8, 4]


def test_a_kernel_of_zeros_keeps_one_slot():
    model = network(WIDTH, WIDTH)
    model.layers[0].kernel.set_value(jnp.zeros((WIDTH, WIDTH)))
    small, plan = compress(model, 0.1, method="gaudi", granularity=(8, 4), rounds=2)
    assert isinstance(small.layers[0], GaudiLinear)
    assert plan["layers"]["layers/0"]["num_blocks"] == small.layers[0].num_blocks == 1
    np.testing.assert_array_equal(small(jnp.ones((1, WIDTH))), 0)


curves = st.lists(
    st.tuples(
        st.lists(st.floats(0, 10), min_size=1, max_size=6),
        st.integers(1, 9),
        st.integers(1, 9),
        st.integers(0, 40),
    ),
    min_size=1,
    max_size=4,
).map(lambda rows: [Curve(np.sort(g)[::-1], s, f, f + extra) for g, s, f, extra in rows])


@given(curves=curves, extra=st.integers(0, 100))
def test_shares_stay_in_their_bounds_and_use_the_total(curves, extra):
    least, most = (sum(getattr(c, name) for c in curves) for name in ("floor", "cap"))
    costs = share_out(curves, least + extra)
    assert all(c.floor <= cost <= c.cap for c, cost in zip(curves, costs, strict=True))
    assert sum(costs) == min(least + extra, most)


@given(curves=curves, extra=st.integers(0, 100))
def test_whole_components_are_bought_until_none_fits(curves, extra):
    """From the floor on, which buys the first one; the last may be cut short by the cap."""
    curves = [c._replace(whole=True) for c in curves]
    total = sum(c.floor for c in curves) + extra
    costs = share_out(curves, total)
    assert sum(costs) <= total
    left = total - sum(costs)
    for curve, cost in zip(curves, costs, strict=True):
        ends = curve.floor + curve.step * np.arange(len(curve.gains))
        ends = [*ends[ends < curve.cap], curve.cap]
        assert cost in ends
        assert cost == curve.cap or left < ends[ends.index(cost) + 1] - cost


def gained(curve, cost):
    ends = np.clip(cost - curve.step * np.arange(len(curve.gains)), 0, curve.step)
    return (ends * curve.gains).sum() / curve.step


@given(curves=curves, extra=st.integers(0, 100), data=st.data())
def test_no_transfer_between_layers_gains_anything(curves, extra, data):
    costs = share_out(curves, sum(c.floor for c in curves) + extra)
    i, j = (data.draw(st.integers(0, len(curves) - 1)) for _ in range(2))
    moved = list(costs)
    moved[i] -= 1
    moved[j] += 1
    if all(c.floor <= cost <= c.cap for c, cost in zip(curves, moved, strict=True)):
        now, then = (sum(map(gained, curves, each)) for each in (costs, moved))
        assert then <= now + 1e-9


@pytest.mark.parametrize("method", ["gaudi", "low_rank", "monarch"])
@pytest.mark.parametrize("floor", [0.0, 0.75, 1.0])
def test_each_layer_keeps_its_floor(method, floor):
    model = network(*[WIDTH] * 4)
    simple = model.layers[1]
    simple.kernel.set_value(jnp.outer(simple.kernel[:, 0], simple.kernel[0]))
    options = {"allocation": "global", "method": method, "rounds": 2, "blocks": 2}
    if method != "monarch":
        del options["blocks"]
    plan = compress(model, 0.5, floor=floor, **options).plan
    costs = [plan["layers"][f"layers/{i}"]["multiplications"] for i in range(3)]
    assert sum(costs) <= 1.5 * WIDTH**2
    component = 2 * WIDTH * (2 if method == "monarch" else 1)
    assert costs[1] >= floor * 0.5 * WIDTH**2 - component
    if not floor:
        assert costs[1] <= component
    if floor == 1:
        assert max(costs) - min(costs) <= component


@pytest.mark.parametrize("method", ["gaudi", "low_rank"])
def test_global_budgets_beat_uniform_ones_where_spectra_differ(method):
    model = network(*[WIDTH] * 4)
    simple = model.layers[2]
    simple.kernel.set_value(jnp.outer(simple.kernel[:, 0], simple.kernel[0]))
    rules = [Rule("layers/0", budget=0.25), Rule(".*")]
    options = {"rules": rules, "calibration": [tokens()], "method": method, "rounds": 2}
    uniform, spread = (
        compress(model, 0.4, allocation=allocation, **options).plan
        for allocation in ("uniform", "global")
    )
    assert spread["multiplications"] <= 2 * int(0.4 * WIDTH**2) + int(0.25 * WIDTH**2)
    assert spread["layers"]["layers/0"] == uniform["layers"]["layers/0"]

    def mean_square(plan):
        return np.mean([entry["activation_error"] ** 2 for entry in plan["layers"].values()])

    assert mean_square(spread) < 0.9 * mean_square(uniform)
