"""Latency of packed Gaudi layers beside dense ones and low-rank ones of the same cost.

    python benchmarks/deploy.py [--parts layers vit gpt2] [--budget 0.3] [--granularity 64]
    python benchmarks/deploy.py --parts curve [--budgets 0.1 0.2 0.3 0.45] [--granularity 64]

*layers*: the three shapes of ViT-B, on 1576 tokens (8 images). The kernels are those of
``benchmarks/decompose.py``, like trained attention layers; the blocks are found by `decompose`.
*curve*: the same over a range of costs, and a picture of error against measured time,
``benchmarks/results/deploy-curve.png``. *vit*: ViT-B/16 forward on 8 images. *gpt2*: GPT-2 small,
greedy decoding of one row (``--gpt2-budget 0.44`` in its linear layers). Each model holds one
kernel per shape in all of its layers, which changes its function, and not its time.

All forms of a model are measured in one process, interleaved and warm; times are medians. The
packed form is compared with the dense product of the same blocks in the same run.
"""

import argparse
from collections.abc import Callable
from functools import cache, partial
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
IMAGES, PATCHES = 8, 197
PROMPT, NEW = 16, 65


@cache
def trained_like(n: int, m: int) -> jax.Array:
    return kernel(jax.random.key(n + m), n, m)


@cache
def gaudi(n: int, m: int, budget: float, granularity: int) -> GaudiLinear:
    factors = gaudi_jax.decompose(trained_like(n, m), budget, granularity=granularity, rounds=20)
    layer = GaudiLinear.from_blocks(*factors, granularity=granularity, bias=jnp.zeros(m))
    layer.eval()
    return layer


@cache
def low_rank(n: int, m: int, cost: int) -> LowRankLinear:
    layer = LowRankLinear(n, m, rank=cost // (n + m), rngs=nnx.Rngs(0))
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
    blocks = gaudi(n, m, budget, args.granularity)
    return {
        "dense": partial(dense, blocks),
        "packed": lambda: gaudi_jax.harden(blocks, tokens=tokens, autotune=args.autotune).model,
        "low-rank": lambda: nnx.clone(low_rank(n, m, int(blocks.multiplications()))),
    }


def difference(a: jax.Array, b: jax.Array) -> float:
    """Largest difference over the largest value."""
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def layers(args: argparse.Namespace) -> None:
    rows = layer_rows(args, args.budget)
    show(rows)
    print(f"mean speed-up of the packed layers: {np.mean([row[4] for row in rows]):.2f}")


def curve(args: argparse.Namespace) -> None:
    rows = [row for budget in args.budgets for row in layer_rows(args, budget)]
    show(rows)
    figure = Figure(figsize=(4 * len(SHAPES), 4), dpi=100, layout="constrained")
    for axes, (n, m) in zip(figure.subplots(1, len(SHAPES)), SHAPES, strict=True):
        own = [row for row in rows if row[0] == f"{n} → {m}"]
        for name, speed, error in (("Gaudi, packed", 4, 6), ("low-rank", 5, 7)):
            axes.plot(
                [1 / row[speed] for row in own], [row[error] for row in own], "o-", label=name
            )
        axes.set(title=own[0][0], xlabel="time over dense", ylabel="relative error", yscale="log")
        axes.axvline(1, color="grey", linewidth=0.8)
    axes.legend()
    figure.savefig(RESULTS / "deploy-curve.png")


def show(rows: list[tuple]) -> None:
    headers = (
        *("layer", "cost", "packed cost", "dense ms", "packed: faster", "low-rank: faster"),
        *("packed: error", "low-rank: error", "difference"),
    )
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".3g"), flush=True)


def layer_rows(args: argparse.Namespace, budget: float) -> list[tuple]:
    """A row for each shape: times of its forms, and their errors."""
    tokens, rows = IMAGES * PATCHES, []
    for n, m in SHAPES:
        x = jax.random.normal(jax.random.key(0), (tokens, n))
        made = {name: make() for name, make in forms(n, m, budget, args, tokens).items()}
        calls = {name: Running(model, x) for name, model in made.items()}
        seconds = interleaved_medians(calls, args.repeats)
        errors = {
            name: float(relative_error(trained_like(n, m), kernel_of(model)))
            for name, model in made.items()
        }
        rows.append(
            (
                f"{n} → {m}",
                int(gaudi(n, m, budget, args.granularity).multiplications()) / (n * m),
                int(made["packed"].multiplications()) / (n * m),
                1e3 * seconds["dense"],
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
    model = nnx.clone(model)
    for path, module in list(nnx.iter_modules(model)):
        if isinstance(module, nnx.Linear) and "blocks" in path:
            sizes = module.in_features, module.out_features
            become(module, forms(*sizes, budget, args, tokens)[form]())
    model.eval()
    return model


def vit(args: argparse.Namespace) -> None:
    config = ViTConfig.preset("B/16")
    model = ViT(config, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (IMAGES, 224, 224, 3))
    calls = {
        form: Running(with_layers(model, form, args.budget, args, IMAGES * PATCHES), images)
        for form in ("dense", "packed", "low-rank")
    }
    report("ViT-B/16 forward, 8 images", interleaved_medians(calls, args.repeats))
    print(f"difference of the logits: {difference(calls['packed'](), calls['dense']()):.1e}")


def gpt2(args: argparse.Namespace) -> None:
    model = GPT2(GPT2Config.preset("gpt2"), rngs=nnx.Rngs(0))
    prompt = [list(range(PROMPT))]

    def decode(model: GPT2, count: int) -> Callable[[], np.ndarray]:
        length = PROMPT + NEW
        return lambda: generate(
            model, prompt, max_new_tokens=count, temperature=0, max_length=length
        )

    calls, tokens = {}, {}
    for form in ("dense", "packed", "low-rank"):
        made = with_layers(model, form, args.gpt2_budget, args, tokens=1)
        calls[form, 1], calls[form, NEW] = decode(made, 1), decode(made, NEW)
        tokens[form] = calls[form, NEW]()
    seconds = interleaved_medians(calls, args.repeats)
    # Without what reading the prompt takes.
    step = {form: (seconds[form, NEW] - seconds[form, 1]) / (NEW - 1) for form in tokens}
    report("GPT-2 small, a token of one row", step)
    print(f"same tokens: {(tokens['packed'] == tokens['dense']).mean():.0%}")


def report(name: str, seconds: dict[str, float]) -> None:
    rows = [(form, 1e3 * s, seconds["dense"] / s) for form, s in seconds.items()]
    print(tabulate(rows, (name, "ms", "faster than dense"), tablefmt="github", floatfmt=".3g"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["layers", "vit", "gpt2"])
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--gpt2-budget", type=float, default=0.44)
    parser.add_argument("--granularity", type=int, default=64)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.45])
    parser.add_argument("--autotune", action="store_true", help="measure layouts")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, float32")
    for part in args.parts:
        {"layers": layers, "curve": curve, "vit": vit, "gpt2": gpt2}[part](args)


if __name__ == "__main__":
    main()
