"""Latency of packed Gaudi layers beside dense ones and low-rank ones of the same cost.

    python benchmarks/deploy.py [--parts layers vit gpt2] [--budget 0.25] [--granularity 64]
    python benchmarks/deploy.py --parts curve [--budgets 0.1 0.2 0.25 0.3 0.45] [--granularity 64]
    python benchmarks/deploy.py --spread 4          # blocks of one size on 4 parts of each axis

    python benchmarks/deploy.py --parts layers vit --images 128 --dtype bfloat16 --times 100
        --granularity 128 --rank 32                                              # a GPU

*layers*: the three shapes of ViT-B, on 1576 tokens (8 images). The kernels are those of
``benchmarks/decompose.py``, like trained attention layers; the blocks are found by `decompose`, or
laid by `spread`.
*curve*: the same over a range of costs, and a picture of error against measured time,
``benchmarks/results/deploy-curve-BACKEND.png``. *vit*: ViT-B/16 forward on 8 images. *gpt2*: GPT-2
small, greedy decoding of one row (``--gpt2-budget 0.44`` in its linear layers, ``--gpt2-rank 16``).
Each model holds one kernel per shape in all of its layers, which changes its function, and not its
time. The blocks are kept in ``--blocks FOLDER``, where a search need not be made again; with
``--keep`` the rows are added to ``benchmarks/results/deploy.csv``.

All forms of a model are measured in one process, interleaved and warm; times are medians. The
packed form is compared with the dense product of the same blocks in the same run, which fails where
they differ by more than rounding. Where a layer takes no longer than it takes to start a program,
as on GPUs, it is applied several times (``--times``). ``--attention cudnn`` takes cuDNN's fused
attention in all forms of a model.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decompose import kernel
from deployed import FORMS, at_once, in_dtype, low_rank_of
from flax import nnx
from matplotlib.figure import Figure
from runs import RESULTS, Row, Table, commit
from tabulate import tabulate

import gaudi_jax
from gaudi_jax import GaudiLinear, LowRankLinear
from gaudi_jax.compression.surgery import become
from gaudi_jax.decomposition import relative_error, spread
from gaudi_jax.deploy.timing import Running, interleaved_medians
from gaudi_jax.models import GPT2, GPT2Config, ViT, ViTConfig
from gaudi_jax.models.generate import generate

SHAPES = [(768, 768), (768, 3072), (3072, 768)]
PATCHES = 197
PROMPT, NEW = 16, 65
STD = 0.02  # of kernels, as GPT-2's: larger ones blow rounding up from layer to layer
COLUMNS = (
    *("part", "what", "rows", "dtype", "rank", "granularity", "spread", "cost", "multiplications"),
    *("dense_ms", "packed_ms", "low_rank_ms", "packed_error", "low_rank_error", "difference"),
    *("device", "commit", "jax", "date"),
)
KEPT = Table(RESULTS / "deploy.csv", COLUMNS)
#: Largest difference of packed from dense outputs, over the largest output, that is rounding.
ROUNDING = {"float32": 1e-4, "bfloat16": 0.05}


@cache
def trained_like(n: int, m: int) -> jax.Array:
    made = kernel(jax.random.key(n + m), n, m)
    return made * (STD / jnp.std(made))


@cache
def spread_gaudi(n: int, m: int, budget: float, parts: int) -> GaudiLinear:
    layer = GaudiLinear.from_blocks(
        *spread(trained_like(n, m), budget, parts=parts), bias=jnp.zeros(m)
    )
    layer.eval()
    return layer


@cache
def searched_gaudi(
    n: int, m: int, budget: float, granularity: int, rank: int, folder: Path | None
) -> GaudiLinear:
    file = folder and folder / f"{n}x{m}-{budget}-{granularity}-{rank}-{STD}.npz"
    if file and file.exists():
        factors = tuple(np.load(file).values())
    else:
        factors = gaudi_jax.decompose(
            trained_like(n, m), budget, granularity=granularity, rank=rank, rounds=20
        )
    if file and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, *factors)
    layer = GaudiLinear.from_blocks(*factors, granularity=granularity, bias=jnp.zeros(m))
    layer.eval()
    return layer


def gaudi(n: int, m: int, budget: float, rank: int, args: argparse.Namespace) -> GaudiLinear:
    if args.spread:
        return spread_gaudi(n, m, budget, args.spread)
    return searched_gaudi(n, m, budget, args.granularity, rank, args.blocks)


@cache
def low_rank(n: int, m: int, cost: int, tokens: int, dtype: str) -> LowRankLinear:
    return low_rank_of(trained_like(n, m), cost, tokens, dtype=jnp.dtype(dtype))


def dense(layer: GaudiLinear) -> Any:
    """The dense layer with the same function."""
    n, m = layer.in_features, layer.out_features
    linear: Any = nnx.eval_shape(lambda: nnx.Linear(n, m, rngs=nnx.Rngs(0)))
    linear.kernel.set_value(layer.kernel())
    linear.bias.set_value(jnp.zeros(m))
    return linear


def forms(
    n: int, m: int, budget: float, rank: int, args: argparse.Namespace, tokens: int
) -> dict[str, Callable[[], Any]]:
    """How each form of a layer is made."""
    blocks = nnx.clone(gaudi(n, m, budget, rank, args))
    blocks.dtype = jnp.dtype(args.dtype)  # the layout is chosen for it
    return {
        "dense": partial(dense, blocks),
        "packed": lambda: gaudi_jax.harden(blocks, tokens=tokens, autotune=args.autotune).model,
        "low_rank": lambda: nnx.clone(
            low_rank(n, m, int(blocks.multiplications()), tokens, args.dtype)
        ),
    }


def difference(a: jax.Array, b: jax.Array) -> float:
    """Largest difference over the largest value."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def layers(args: argparse.Namespace) -> list[Row]:
    rows = layer_rows(args, args.budget)
    show(rows)
    mean = np.mean([row["dense_ms"] / row["packed_ms"] for row in rows])
    print(f"mean speed-up of the packed layers: {mean:.2f}")
    return rows


def curve(args: argparse.Namespace) -> list[Row]:
    rows = [row for budget in args.budgets for row in layer_rows(args, budget)]
    show(rows)
    draw(rows, args.spread)
    return rows


def draw(rows: Sequence[Row], parts: int | None) -> None:
    """Errors against times over the median time of the dense layer."""
    figure = Figure(figsize=(4 * len(SHAPES), 4), dpi=100, layout="constrained")
    names = dict.fromkeys(row["what"] for row in rows)
    for axes, name in zip(figure.subplots(1, len(SHAPES)), names, strict=True):
        own = [row for row in rows if row["what"] == name]
        dense = statistics.median(row["dense_ms"] for row in own)
        for label, form in (("Gaudi, packed", "packed"), ("low-rank", "low_rank")):
            axes.plot(
                [row[f"{form}_ms"] / dense for row in own],
                [row[f"{form}_error"] for row in own],
                "o-",
                label=label,
            )
        axes.set(title=name, xlabel="time over dense", ylabel="relative error", yscale="log")
        axes.axvline(1, color="grey", linewidth=0.8)
    axes.legend()
    suffix = f"-spread-{parts}" if parts else ""
    figure.savefig(RESULTS / f"deploy-curve-{jax.default_backend()}{suffix}.png")


def show(rows: Sequence[Row]) -> None:
    lines = [
        (
            *(row[name] for name in ("what", "cost", "multiplications", "dense_ms")),
            row["dense_ms"] / row["packed_ms"],
            row["dense_ms"] / row["low_rank_ms"],
            *(row.get(name) for name in ("packed_error", "low_rank_error")),
            f"{row['difference']:.1e}",
        )
        for row in rows
    ]
    headers = (
        *("", "cost", "multiplications made", "dense ms", "packed: faster", "low-rank: faster"),
        *("packed: error", "low-rank: error", "difference"),
    )
    print(tabulate(lines, headers, tablefmt="github", floatfmt=".3g"), flush=True)


def layer_rows(args: argparse.Namespace, budget: float) -> list[Row]:
    """A row for each shape: times of its forms, and their errors."""
    tokens, rows = args.images * PATCHES, []
    for n, m in SHAPES:
        x = jax.random.normal(jax.random.key(0), (tokens, n), args.dtype)
        made = {name: make() for name, make in forms(n, m, budget, args.rank, args, tokens).items()}
        calls = at_once(
            {
                name: partial(Running, in_dtype(model, args.dtype), x, times=args.times)
                for name, model in made.items()
            }
        )
        seconds = interleaved_medians(calls, args.repeats)
        blocks = gaudi(n, m, budget, args.rank, args)
        row = {
            "what": f"{n} → {m}",
            "rows": tokens,
            "rank": args.rank,
            "cost": int(blocks.multiplications()) / (n * m),
            "multiplications": int(made["packed"].multiplications()) / (n * m),
            "difference": difference(calls["packed"](), calls["dense"]()),
        }
        for name, model in made.items():
            row[f"{name}_ms"] = 1e3 * seconds[name] / args.times
            if name != "dense":
                error = relative_error(trained_like(n, m), kernel_of(model))
                row[f"{name}_error"] = float(error)
        rows.append(row)
    return rows


def kernel_of(layer: Any) -> jax.Array:
    return layer.kernel[...] if isinstance(layer, nnx.Linear) else layer.kernel()


def with_layers(
    model: nnx.Module, form: str, budget: float, rank: int, args: argparse.Namespace, tokens: int
) -> Any:
    """The model with one layer per shape in all of its blocks."""
    model, made = nnx.clone(model), {}
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, nnx.Linear) and "blocks" in path:
            sizes = module.in_features, module.out_features
            if sizes not in made:
                made[sizes] = forms(*sizes, budget, rank, args, tokens)[form]()
            # Arrays of its own: shared ones would stay in the caches.
            become(module, nnx.clone(made[sizes], arrays=True))
    model.eval()
    return in_dtype(model, args.dtype)


def vit(args: argparse.Namespace) -> list[Row]:
    config = dataclasses.replace(ViTConfig.preset("B/16"), dtype=jnp.dtype(args.dtype))
    model = ViT(config, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (args.images, 224, 224, 3), args.dtype)
    tokens = args.images * PATCHES
    made = {form: with_layers(model, form, args.budget, args.rank, args, tokens) for form in FORMS}
    calls = at_once({form: partial(Running, model, images) for form, model in made.items()})
    seconds = interleaved_medians(calls, args.repeats)
    row = {"what": "ViT-B/16 forward", "rows": args.images, "rank": args.rank, "cost": args.budget}
    return report(row, seconds, difference(calls["packed"](), calls["dense"]()))


def gpt2(args: argparse.Namespace) -> list[Row]:
    config = dataclasses.replace(GPT2Config.preset("gpt2"), dtype=jnp.dtype(args.dtype))
    model = GPT2(config, rngs=nnx.Rngs(0))
    made = {
        form: with_layers(model, form, args.gpt2_budget, args.gpt2_rank, args, tokens=args.rows)
        for form in FORMS
    }
    row = {
        "what": "GPT-2 small, a token of each row",
        "rows": args.rows,
        "rank": args.gpt2_rank,
        "cost": args.gpt2_budget,
    }
    return decoding(row, made, [list(range(PROMPT))] * args.rows, NEW, args.repeats)


def decoding(
    row: Row, made: Mapping[str, GPT2], prompt: list[list[int]], new: int, repeats: int
) -> list[Row]:
    """What one more token of each row takes, without what reading the prompt takes."""
    length = len(prompt[0]) + new

    def decode(model: GPT2, count: int) -> Callable[[], np.ndarray]:
        return lambda: generate(
            model, prompt, max_new_tokens=count, temperature=0, max_length=length
        )

    calls = {
        (form, count): decode(model, count) for form, model in made.items() for count in (1, new)
    }
    tokens = at_once({form: calls[form, new] for form in made})
    seconds = interleaved_medians(calls, repeats)
    step = {form: (seconds[form, new] - seconds[form, 1]) / (new - 1) for form in made}
    # One token of each row goes through the products that decoding makes.
    first = jnp.asarray(prompt)[:, :1]
    logits = {form: nnx.jit(made[form])(first) for form in ("dense", "packed")}
    rows = report(row, step, difference(logits["packed"], logits["dense"]))
    print(f"the same tokens: {(tokens['packed'] == tokens['dense']).mean():.0%}")
    return rows


def report(row: Row, seconds: Mapping[str, float], missed: float) -> list[Row]:
    """Prints the times of a model's forms, and makes them a row."""
    lines = [(form, 1e3 * s, seconds["dense"] / s) for form, s in seconds.items()]
    title = f"{row['what']}, {row['rows']} rows"
    print(tabulate(lines, (title, "ms", "faster than dense"), tablefmt="github", floatfmt=".3g"))
    print(f"difference of the logits: {missed:.1e}", flush=True)
    return [row | {f"{form}_ms": 1e3 * s for form, s in seconds.items()} | {"difference": missed}]


def check(rows: Sequence[Row], dtype: str) -> None:
    """Fails where packed outputs are not those of the dense products."""
    wrong = [row for row in rows if not row["difference"] <= ROUNDING[dtype]]
    if wrong:
        told = ", ".join(f"{row['what']}: {row['difference']:.1e}" for row in wrong)
        raise SystemExit(f"packed outputs differ from dense ones by more than rounding ({told})")


def keep(rows: Sequence[Row]) -> None:
    """Adds rows to those that are kept."""
    same = {
        "device": jax.devices()[0].device_kind,
        "commit": commit(),
        "jax": jax.__version__,
        "date": date.today().isoformat(),
    }
    for row in rows:
        KEPT.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in (row | same).items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["layers", "curve", "vit", "gpt2"],
        default=["layers", "vit", "gpt2"],
    )
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--gpt2-budget", type=float, default=0.44)
    parser.add_argument("--granularity", type=int, default=64)
    parser.add_argument("--rank", type=int, default=4, help="columns of a block")
    parser.add_argument(
        "--spread", type=int, help="parts of each axis for blocks of one size, without a search"
    )
    parser.add_argument("--gpt2-rank", type=int, default=16)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.2, 0.25, 0.3, 0.45])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1, help="that GPT-2 decodes at once")
    parser.add_argument("--dtype", choices=list(ROUNDING), default="float32")
    parser.add_argument("--blocks", type=Path, help="folder of blocks that were found before")
    parser.add_argument(
        "--autotune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure layouts, instead of choosing by the model of costs",
    )
    parser.add_argument("--keep", action="store_true", help=f"rows in {KEPT.path.name}")
    parser.add_argument("--attention", choices=["xla", "cudnn"], help="whose kernel for attention")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--times", type=int, default=1, help="that a program applies a layer")
    args = parser.parse_args()
    if args.spread is not None:
        if args.spread < 1:
            parser.error(f"--spread {args.spread} must be at least 1")
        for name in ("rank", "gpt2_rank", "granularity", "blocks"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} has no effect beside --spread")
        args.rank = args.gpt2_rank = 1  # columns on the same parts are put together anyway
    if args.attention:
        attention = partial(jax.nn.dot_product_attention, implementation=args.attention)
        vars(jax.nn).update(dot_product_attention=attention)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dtype}")
    rows: list[Row] = []
    for part in args.parts:
        made = {"layers": layers, "curve": curve, "vit": vit, "gpt2": gpt2}[part](args)
        grid = {"spread": args.spread} if args.spread else {"granularity": args.granularity}
        same = {"part": part, "dtype": args.dtype, **grid}
        rows.extend(same | row for row in made)
    check(rows, args.dtype)
    if args.keep:
        keep(rows)


if __name__ == "__main__":
    main()
