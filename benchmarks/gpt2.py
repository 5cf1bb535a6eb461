"""Training steps of GPT-2: ours through the training loop's step, and a plain one in Flax NNX.

    python benchmarks/gpt2.py                                             # the docs config, dense
    python benchmarks/gpt2.py --config "shakespeare_gpt_gaudi.py:text=PATH"
    python benchmarks/gpt2.py --preset gpt2 --batch 16 --peak 989          # on an H100 or H200

The plain step is what one would write without this library: `nnx.Linear`, `nnx.Optimizer`,
`nnx.jit`. All steps are made in one process, interleaved and warm, on one batch that is there
already, without dropout; medians are shown. With ``--preset`` the model is a published one on
windows of 1024 random tokens in bfloat16. *Share of peak* counts 6 operations for each
multiplication of the dense twin's linear layers, and attention's own, over ``--peak`` teraflops a
second.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict
from steps import our_step
from tabulate import tabulate

from gaudi_jax.deploy.timing import interleaved_medians
from gaudi_jax.training.setup import build_model
from gaudi_jax.training.tasks import Task, open_task

# Configs are files beside main.py, and no installed package.
sys.path.insert(0, str(Path(__file__).parents[1]))


class PlainAttention(nnx.Module):
    def __init__(self, width: int, heads: int, dtype: Any, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, t, d = x.shape
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        q, k, v = (y.reshape(b, t, self.heads, d // self.heads) for y in (q, k, v))
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, t, d))


class PlainBlock(nnx.Module):
    def __init__(self, width: int, heads: int, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = PlainAttention(width, heads, dtype, rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.fc1 = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x)), approximate=True))


class PlainGPT2(nnx.Module):
    def __init__(self, config: ConfigDict, dtype: Any, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(config.vocab_size, config.width, dtype=dtype, rngs=rngs)
        self.places = nnx.Embed(config.context, config.width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [PlainBlock(config.width, config.heads, dtype, rngs) for _ in range(config.depth)]
        )
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.tokens(tokens) + self.places(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.tokens.attend(self.norm(x)).astype(jnp.float32)


def plain_step(config: ConfigDict, batch: dict) -> Any:
    """A function that makes one step."""
    dtype = jnp.dtype(config.model.dtype)
    model = PlainGPT2(config.model, dtype, nnx.Rngs(0))
    tx = optax.chain(
        optax.clip_by_global_norm(config.optimizer.clip_norm or 1.0),
        optax.adamw(config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens, targets):
        def loss_fn(model):
            logits = model(tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    return lambda: step(model, optimizer, inputs, targets)


def open_config(name: str, layer: str, args: argparse.Namespace) -> Task:
    file, _, arguments = ("gpt2_gaudi.py:smoke" if args.preset else name).partition(":")
    module = importlib.import_module(f"configs.{file.removesuffix('.py')}")
    # Structured from the first step.
    recipe = "" if layer == "dense" else "recipe=budget"
    config = module.get_config(",".join(filter(None, [arguments, f"layer={layer}", recipe])))
    config.model.dropout = 0.0  # which the plain model has not
    if args.batch:
        config.data.batch_size = args.batch
    task: Any = open_task(config)
    if args.preset:
        with task.config.unlocked():
            task.config.data.block = 1024
            task.config.model.update(
                preset=args.preset, vocab_size=50257, context=1024, dtype="bfloat16"
            )
            for size in ("width", "depth", "heads"):
                del task.config.model[size]
    return task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="docs_gpt_gaudi.py", help="file and its arguments")
    parser.add_argument("--preset", default="", help="a published size, such as gpt2")
    parser.add_argument("--batch", type=int, default=0, help="windows of a step")
    parser.add_argument("--layers", nargs="+", default=["dense"], help="dense, gaudi, low_rank")
    parser.add_argument("--peak", type=float, default=0.0, help="teraflops a second")
    parser.add_argument("--repeats", type=int, default=31)
    args = parser.parse_args()

    tasks = {layer: open_config(args.config, layer, args) for layer in args.layers}
    config = tasks[args.layers[0]].config
    dense = build_model(config).config
    size = ConfigDict(
        {
            name: getattr(dense, name)
            for name in ("vocab_size", "context", "width", "depth", "heads")
        }
    )
    shape = config.data.batch_size, config.data.block + 1
    tokens = jax.random.randint(jax.random.key(0), shape, 0, size.vocab_size)
    steps = {
        f"ours, {layer}": our_step(task, build_model(task.config), {"tokens": tokens})
        for layer, task in tasks.items()
    }
    plain = ConfigDict({"model": size, "optimizer": config.optimizer})
    with plain.unlocked():
        plain.model.dtype = config.model.dtype
    steps["plain NNX, dense"] = plain_step(plain, {"tokens": tokens})
    times = interleaved_medians(steps, args.repeats)
    count = config.data.batch_size * config.data.block
    # 2 operations a multiplication, forward and twice backward; scores and their use in attention.
    layers = 12 * size.depth * size.width**2 + size.vocab_size * size.width
    operations = 6 * count * (layers + size.depth * size.width * config.data.block)
    rows = [
        (
            name,
            seconds * 1e3,
            count / seconds,
            seconds / times["plain NNX, dense"],
            operations / seconds / (args.peak * 1e12) if args.peak else None,
        )
        for name, seconds in times.items()
    ]
    headers = ("step", "ms", "tokens/s", "over plain", "share of peak")
    print(f"{size.to_dict()}, batch {shape}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=(None, ".1f", ".0f", ".3f", ".3f")))


if __name__ == "__main__":
    main()
