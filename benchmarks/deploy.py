"""Latency of packed Gaudi layers beside dense ones and low-rank ones of the same cost.

    python benchmarks/deploy.py [--parts layers vit gpt2] [--budget 0.3] [--granularity 64]
    python benchmarks/deploy.py --parts curve [--budgets 0.1 0.2 0.3 0.45] [--granularity 64]

    python benchmarks/deploy.py --parts layers vit --images 128 --dtype bfloat16 --times 100
        --granularity 128 --rank 32 --autotune                                   # a GPU

*layers*: the three shapes of ViT-B, on 1576 tokens (8 images). The kernels are those of
``benchmarks/decompose.py``, like trained attention layers; the blocks are found by `decompose`.
*curve*: the same over a range of costs, and a picture of error against measured time,
``benchmarks/results/deploy-curve-BACKEND.png``. *vit*: ViT-B/16 forward on 8 images. *gpt2*: GPT-2
small, greedy decoding of one row (``--gpt2-budget 0.44`` in its linear layers). Each model holds
one kernel per shape in all of its layers, which changes its function, and not its time. The blocks
are kept in ``--blocks FOLDER``, where a search need not be made again.

All forms of a model are measured in one process, interleaved and warm; times are medians. The
packed form is compared with the dense product of the same blocks in the same run. Where a layer
takes no longer than it takes to start a program, as on GPUs, it is applied several times
(``--times``). ``--attention cudnn`` takes cuDNN's fused attention in all forms of a model.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decompose import kernel
from flax import nnx
from matplotlib.figure import Figure
from runs import RESULTS
from tabulate import tabulate

import gaudi_jax
from gaudi_jax import GaudiLinear, LowRankLinear
from gaudi_jax.compression.surgery import become
from gaudi_jax.decomposition import relative_error
from gaudi_jax.deploy.timing import Running, interleaved_medians
from gaudi_jax.models import GPT2, GPT2Config, ViT, ViTConfig
from gaudi_jax.models.generate import generate

SHAPES = [(768, 768), (768, 3072), (3072, 768)]
PATCHES = 197
PROMPT, NEW = 16, 65


@cache
def trained_like(n: int, m: int) -> jax.Array:
    return kernel(jax.random.key(n + m), n, m)


@cache
def gaudi(
    n: int, m: int, budget: float, granularity: int, rank: int, folder: Path | None
) -> GaudiLinear:
    file = folder and folder / f"{n}x{m}-{budget}-{granularity}-{rank}.npz"
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


@cache
def low_rank(n: int, m: int, cost: int) -> LowRankLinear:
    rank = cost // (n + m)
    if jax.default_backend() != "cpu":  # matrix units are slow on other ranks
        rank = max(8 * round(rank / 8), 8)
    layer = LowRankLinear(n, m, rank=rank, rngs=nnx.Rngs(0))
    layer.set_kernel(trained_like(n, m))
    return layer


def dense(layer: GaudiLinear) -> Any:
    """The dense layer with the same function."""
    n, m = layer.in_features, layer.out_features
    linear: Any = nnx.eval_shape(lambda: nnx.Linear(n, m, rngs=nnx.Rngs(0)))
    linear.kernel.set_value(layer.kernel())
    linear.bias.set_value(jnp.zeros(m))
    return linear


def forms(
    n: int, m: int, budget: float, args: argparse.Namespace, tokens: int
) -> dict[str, Callable[[], Any]]:
    """How each form of a layer is made."""
    blocks = nnx.clone(gaudi(n, m, budget, args.granularity, args.rank, args.blocks))
    blocks.dtype = jnp.dtype(args.dtype)  # the layout is chosen for it
    return {
        "dense": partial(dense, blocks),
        "packed": lambda: gaudi_jax.harden(blocks, tokens=tokens, autotune=args.autotune).model,
        "low-rank": lambda: nnx.clone(low_rank(n, m, int(blocks.multiplications()))),
    }


def in_dtype(model: Any, name: str) -> Any:
    """The model with parameters of a dtype, which computes in it."""
    dtype = jnp.dtype(name)
    graphdef, state = nnx.split(model)
    cast = [
        x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for x in jax.tree.leaves(state)
    ]
    result = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), cast))
    for _, module in nnx.iter_modules(result):
        if hasattr(module, "param_dtype"):
            vars(module).update(dtype=dtype, param_dtype=dtype)
    return result


def at_once(makers: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """What each makes: compilation, which takes longest, leaves cores idle."""
    with ThreadPoolExecutor() as pool:
        made = [pool.submit(make) for make in makers.values()]
        return dict(zip(makers, [future.result() for future in made], strict=True))


def difference(a: jax.Array, b: jax.Array) -> float:
    """Largest difference over the largest value."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def layers(args: argparse.Namespace) -> None:
    rows = layer_rows(args, args.budget)
    show(rows)
    print(f"mean speed-up of the packed layers: {np.mean([row[4] for row in rows]):.2f}")


def curve(args: argparse.Namespace) -> None:
    rows = [row for budget in args.budgets for row in layer_rows(args, budget)]
    show(rows)
    draw(rows)


def draw(rows: list[tuple]) -> None:
    """Errors against times over the median time of the dense layer."""
    figure = Figure(figsize=(4 * len(SHAPES), 4), dpi=100, layout="constrained")
    for axes, (n, m) in zip(figure.subplots(1, len(SHAPES)), SHAPES, strict=True):
        own = [row for row in rows if row[0] == f"{n} → {m}"]
        dense = statistics.median(row[3] for row in own)
        for name, speed, error in (("Gaudi, packed", 4, 6), ("low-rank", 5, 7)):
            axes.plot(
                [row[3] / row[speed] / dense for row in own],
                [row[error] for row in own],
                "o-",
                label=name,
            )
        axes.set(title=own[0][0], xlabel="time over dense", ylabel="relative error", yscale="log")
        axes.axvline(1, color="grey", linewidth=0.8)
    axes.legend()
    figure.savefig(RESULTS / f"deploy-curve-{jax.default_backend()}.png")


def show(rows: list[tuple]) -> None:
    headers = (
        *("layer", "cost", "packed cost", "dense ms", "packed: faster", "low-rank: faster"),
        *("packed: error", "low-rank: error", "difference"),
    )
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".3g"), flush=True)


def layer_rows(args: argparse.Namespace, budget: float) -> list[tuple]:
    """A row for each shape: times of its forms, and their errors."""
    tokens, rows = args.images * PATCHES, []
    for n, m in SHAPES:
        x = jax.random.normal(jax.random.key(0), (tokens, n), args.dtype)
        made = {name: make() for name, make in forms(n, m, budget, args, tokens).items()}
        calls = at_once(
            {
                name: partial(Running, in_dtype(model, args.dtype), x, times=args.times)
                for name, model in made.items()
            }
        )
        seconds = interleaved_medians(calls, args.repeats)
        errors = {
            name: float(relative_error(trained_like(n, m), kernel_of(model)))
            for name, model in made.items()
        }
        rows.append(
            (
                f"{n} → {m}",
                int(gaudi(n, m, budget, args.granularity, args.rank, args.blocks).multiplications())
                / (n * m),
                int(made["packed"].multiplications()) / (n * m),
                1e3 * seconds["dense"] / args.times,
                seconds["dense"] / seconds["packed"],
                seconds["dense"] / seconds["low-rank"],
                errors["packed"],
                errors["low-rank"],
                f"{difference(calls['packed'](), calls['dense']()):.1e}",
            )
        )
    return rows


def kernel_of(layer: Any) -> jax.Array:
    return layer.kernel[...] if isinstance(layer, nnx.Linear) else layer.kernel()


def with_layers(
    model: nnx.Module, form: str, budget: float, args: argparse.Namespace, tokens: int
) -> Any:
    """The model with one layer per shape in all of its blocks."""
    model, made = nnx.clone(model), {}
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, nnx.Linear) and "blocks" in path:
            sizes = module.in_features, module.out_features
            if sizes not in made:
                made[sizes] = forms(*sizes, budget, args, tokens)[form]()
            # Arrays of its own: shared ones would stay in the caches.
            become(module, nnx.clone(made[sizes], arrays=True))
    model.eval()
    return model


def vit(args: argparse.Namespace) -> None:
    config = dataclasses.replace(ViTConfig.preset("B/16"), dtype=jnp.dtype(args.dtype))
    model = ViT(config, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (args.images, 224, 224, 3), args.dtype)
    tokens = args.images * PATCHES
    made = {
        form: in_dtype(with_layers(model, form, args.budget, args, tokens), args.dtype)
        for form in ("dense", "packed", "low-rank")
    }
    calls = at_once({form: partial(Running, model, images) for form, model in made.items()})
    seconds = interleaved_medians(calls, args.repeats)
    report(f"ViT-B/16 forward, {args.images} images", seconds)
    print(f"difference of the logits: {difference(calls['packed'](), calls['dense']()):.1e}")


def gpt2(args: argparse.Namespace) -> None:
    config = dataclasses.replace(GPT2Config.preset("gpt2"), dtype=jnp.dtype(args.dtype))
    model = GPT2(config, rngs=nnx.Rngs(0))
    prompt = [list(range(PROMPT))] * args.rows

    def decode(model: GPT2, count: int) -> Callable[[], np.ndarray]:
        length = PROMPT + NEW
        return lambda: generate(
            model, prompt, max_new_tokens=count, temperature=0, max_length=length
        )

    calls = {}
    for form in ("dense", "packed", "low-rank"):
        made = with_layers(model, form, args.gpt2_budget, args, tokens=args.rows)
        made = in_dtype(made, args.dtype)
        calls[form, 1], calls[form, NEW] = decode(made, 1), decode(made, NEW)
    tokens = at_once({form: call for (form, count), call in calls.items() if count == NEW})
    seconds = interleaved_medians(calls, args.repeats)
    # Without what reading the prompt takes.
    step = {form: (seconds[form, NEW] - seconds[form, 1]) / (NEW - 1) for form in tokens}
    report(f"GPT-2 small, a token of each of {args.rows} rows", step)
    print(f"same tokens: {(tokens['packed'] == tokens['dense']).mean():.0%}")


def report(name: str, seconds: dict[str, float]) -> None:
    rows = [(form, 1e3 * s, seconds["dense"] / s) for form, s in seconds.items()]
    print(tabulate(rows, (name, "ms", "faster than dense"), tablefmt="github", floatfmt=".3g"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=["layers", "curve", "vit", "gpt2"],
        default=["layers", "vit", "gpt2"],
    )
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--gpt2-budget", type=float, default=0.44)
    parser.add_argument("--granularity", type=int, default=64)
    parser.add_argument("--rank", type=int, default=4, help="columns of a block")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.45])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1, help="that GPT-2 decodes at once")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--blocks", type=Path, help="folder of blocks that were found before")
    parser.add_argument("--autotune", action="store_true", help="measure layouts")
    parser.add_argument("--attention", choices=["xla", "cudnn"], help="whose kernel for attention")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--times", type=int, default=1, help="that a program applies a layer")
    args = parser.parse_args()
    if args.attention:
        attention = partial(jax.nn.dot_product_attention, implementation=args.attention)
        vars(jax.nn).update(dot_product_attention=attention)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dtype}")
    for part in args.parts:
        {"layers": layers, "curve": curve, "vit": vit, "gpt2": gpt2}[part](args)


if __name__ == "__main__":
    main()
