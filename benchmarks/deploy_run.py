"""What the layers of a trained run, and its model, take packed, dense and as low-rank layers.

    python benchmarks/deploy_run.py WORKDIR [--batch 16] [--decode] [--keep]

Every Gaudi layer of the run by itself, then the whole model, on a batch of its training data;
``--decode`` also takes the time of one more token of one row of a GPT-2. Low-rank layers are the
truncated SVD of the trained kernels, at each layer's own cost, and are there for their time: what
they lose is the last column but one. How times are measured: ``benchmarks/deploy.py``.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from deploy import check, decoding, difference, keep, report, show
from deployed import FORMS, at_once, in_dtype, low_rank_of
from flax import nnx
from ml_collections import ConfigDict
from runs import Row

import gaudi_jax
from gaudi_jax import GaudiLinear
from gaudi_jax.compression import densify
from gaudi_jax.compression.surgery import become, find_gaudi
from gaudi_jax.data.pipeline import first_batches
from gaudi_jax.decomposition import relative_error
from gaudi_jax.deploy.command import check_positive
from gaudi_jax.deploy.harden import tokens_of
from gaudi_jax.deploy.timing import Running, interleaved_medians
from gaudi_jax.errors import exit_status
from gaudi_jax.models import GPT2
from gaudi_jax.training.tasks import Task, open_task
from gaudi_jax.training.workdir import read_config

PROMPT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--batch", type=int, default=16, help="at most the run's")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--keep", action="store_true", help="rows in deploy.csv")
    args = parser.parse_args()
    if status := exit_status(lambda: measure(args)):
        raise SystemExit(status)


def measure(args: argparse.Namespace) -> None:
    """Measures, prints, keeps."""
    check_positive(args, "batch", "repeats")
    task = open_task(ConfigDict(read_config(args.workdir)))
    model = gaudi_jax.load(args.workdir)
    layers, x = find_gaudi(model)[0], inputs(task)
    if not layers:
        raise SystemExit(f"the run {args.workdir} has no Gaudi layers")
    if args.batch > len(x):
        raise SystemExit(f"--batch {args.batch} is more than the {len(x)} of the run")
    if args.decode and not (isinstance(model, GPT2) and x.shape[1] > PROMPT + 1):
        raise SystemExit(f"--decode needs a run of a GPT-2 on more than {PROMPT + 1} tokens")
    dtype = jnp.dtype(next(iter(layers.values())).dtype or jnp.float32).name
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {dtype}")
    model = in_dtype(model, dtype)
    rows = layer_rows(model, tokens_of(model, task.example, args.batch), args.repeats)
    show(rows)
    rows += model_rows(model, task, x[: args.batch], args.repeats)
    if args.decode:
        rows += decoding_rows(cast(GPT2, model), x[:1], args.repeats)
    check(rows, dtype)
    if args.keep:
        keep([row | {"part": args.workdir.name, "dtype": dtype} for row in rows])


def layer_rows(model: nnx.Module, tokens: dict[str, int], repeats: int) -> list[Row]:
    rows = []
    for path, layer in find_gaudi(model)[0].items():
        x = jax.random.normal(
            jax.random.key(0), (tokens[path], layer.in_features), layer.dtype or jnp.float32
        )
        made = {form: form_of(layer, form, tokens[path]) for form in FORMS}
        calls = at_once({form: partial(Running, one, x) for form, one in made.items()})
        seconds = interleaved_medians(calls, repeats)
        rows.append(
            {
                "what": path,
                "rows": tokens[path],
                **structure(layer),
                "multiplications": relative(layer, int(made["packed"].multiplications())),
                "low_rank_error": float(relative_error(layer.kernel(), made["low_rank"].kernel())),
                "difference": difference(calls["packed"](), calls["dense"]()),
                **{f"{form}_ms": 1e3 * s for form, s in seconds.items()},
            }
        )
    return rows


def form_of(layer: GaudiLinear, form: str, tokens: int) -> Any:
    if form == "dense":
        return densify(layer)
    if form == "packed":
        return gaudi_jax.harden(layer, tokens=tokens, autotune=True).model
    low_rank = low_rank_of(
        layer.kernel(),
        int(layer.multiplications()),
        tokens,
        use_bias=layer.bias is not None,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
    )
    if layer.bias is not None:
        low_rank.bias.set_value(layer.bias.get_value())
    return low_rank


def structure(layer: GaudiLinear) -> Row:
    return {
        "rank": layer.rank,
        "granularity": max(layer.granularity),
        "cost": relative(layer, int(layer.multiplications())),
    }


def relative(layer: GaudiLinear, multiplications: int) -> float:
    return multiplications / (layer.in_features * layer.out_features)


def in_form(model: nnx.Module, form: str, tokens: dict[str, int]) -> Any:
    """The model with all of its Gaudi layers in a form."""
    model = nnx.clone(model)
    for path, layer in find_gaudi(model)[0].items():
        become(layer, form_of(layer, form, tokens[path]))
    model.eval()
    return nnx.clone(model, arrays=True)


def model_rows(model: nnx.Module, task: Task, x: jax.Array, repeats: int) -> list[Row]:
    tokens = tokens_of(model, task.example, len(x))
    made = {form: in_form(model, form, tokens) for form in FORMS}
    calls = at_once({form: partial(Running, one, x) for form, one in made.items()})
    seconds = interleaved_medians(calls, repeats)
    row = {"what": "the model, forward", "rows": len(x), "cost": blocks_cost(model)}
    return report(row, seconds, difference(calls["packed"](), calls["dense"]()))


def decoding_rows(model: GPT2, text: jax.Array, repeats: int) -> list[Row]:
    one_by_one = dict.fromkeys(find_gaudi(model)[0], 1)
    made = {form: in_form(model, form, one_by_one) for form in FORMS}
    row = {"what": "one more token of one row", "rows": 1, "cost": blocks_cost(model)}
    prompt = text[:, :PROMPT].tolist()
    return decoding(row, made, prompt, text.shape[1] - PROMPT, repeats)


def inputs(task: Task) -> jax.Array:
    """Those of the first training batch."""
    (batch,) = first_batches(task.train_batches(), 1)
    return task.inputs({name: jnp.asarray(array) for name, array in batch.items()})


def blocks_cost(model: nnx.Module) -> float:
    """Multiplications of the Gaudi layers over those of dense ones."""
    layers: Any = find_gaudi(model)[0].values()
    whole = sum(layer.in_features * layer.out_features for layer in layers)
    return sum(int(layer.multiplications()) for layer in layers) / whole


if __name__ == "__main__":
    main()
