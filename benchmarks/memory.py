"""The memory of a training step on several devices: estimated, and as compiled; nothing is run.

    python benchmarks/memory.py [--config configs/vit_b_gaudi.py] [--arguments recipe=budget]
        [--devices 8] [--mesh 8 1 1] [--remat] [--accumulate 1]

The step is the first one of a run: of dense layers, where the recipe begins with them. Compiles it
for forced devices of the CPU, whose compiler tells what it has planned, and lowers it for TPUs and
CUDA on as many abstract devices. What is compiled for a TPU or a GPU takes other temporaries; the
state is the same.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


class Step(NamedTuple):
    """A training step without values.

    Attributes:
        function: jitted.
        state: shapes with shardings.
        batch: shapes with shardings.
        estimate: of the memory on each device.
    """

    function: Any
    state: Any
    batch: Any
    estimate: Any


def read_config(path: str, arguments: str) -> Any:
    """The config of a file in which images are generated, so that no data are needed."""
    # Config files import one another as the package `configs`.
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(Path(path).with_suffix("").as_posix().replace("/", "."))
    config = module.get_config(arguments)
    config.data.name = f"generated:1000x{config.data.image_size}x3"
    return config


def abstract_step(config: Any, mesh: Any) -> Step:
    """The training step of a config on a mesh, whose devices may be abstract."""
    import jax
    import numpy as np
    from flax import nnx
    from jax.sharding import NamedSharding

    from gaudi_jax.cost import cost
    from gaudi_jax.training.memory import estimate_memory
    from gaudi_jax.training.mesh import BATCH
    from gaudi_jax.training.setup import build_model, build_optimizer, build_schedules
    from gaudi_jax.training.step import (
        CostWeights,
        TrainState,
        laid_out,
        make_train_step,
        split_model,
        state_layout,
    )
    from gaudi_jax.training.tasks import open_task

    task = open_task(config)
    schedules = build_schedules(task.config)
    model = nnx.eval_shape(lambda: build_model(task.config))
    graphdef, params, other = split_model(model)
    optimizer = build_optimizer(task.config, model, schedules)
    opt_state = jax.eval_shape(optimizer.init, params)
    step_count: Any = jax.ShapeDtypeStruct((), np.int32)
    state = TrainState(step_count, params, other, opt_state)
    layout, state = state_layout(state, mesh), laid_out(state, mesh)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, BATCH))
        for name, x in task.abstract_batch(config.data.batch_size).items()
    }
    # How often a layer is applied does not depend on values, but costs are counted on them.
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), (params, other))
    weights = CostWeights.of(cost(nnx.merge(graphdef, *zeros), task.example))
    function = make_train_step(graphdef, optimizer, schedules, task, weights, 0, layout)
    return Step(function, state, batch, estimate_memory(graphdef, state, task, mesh))


def lower(config: Any, shape: tuple[int, int, int], platforms: tuple[str, ...]) -> dict[str, str]:
    """The training step as StableHLO for abstract devices of platforms ("tpu" or "cuda")."""
    from jax.sharding import AbstractMesh, AxisType

    from gaudi_jax.training.mesh import AXES

    step = abstract_step(config, AbstractMesh(shape, AXES, (AxisType.Auto,) * len(AXES)))
    traced = step.function.trace(step.state, step.batch)
    return {
        platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in platforms
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/vit_b_gaudi.py")
    parser.add_argument("--arguments", default="", help="of the config, such as layer=dense")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--mesh", type=int, nargs=3, default=[-1, 1, 1])
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--remat", action="store_true")
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"

    from gaudi_jax.training.mesh import AXES, make_mesh, mesh_shape

    config = read_config(args.config, args.arguments)
    config.model.remat = args.remat
    config.train.accumulate = args.accumulate
    sizes = dict(zip(AXES, args.mesh, strict=True))
    step = abstract_step(config, make_mesh(sizes))
    print(f"estimated: {step.estimate}", flush=True)
    planned = step.function.lower(step.state, step.batch).compile().memory_analysis()
    print(
        f"compiled for the CPU: state and batch {_gib(planned.argument_size_in_bytes)}, "
        f"temporaries {_gib(planned.temp_size_in_bytes)}",
        flush=True,
    )
    lowered = lower(config, mesh_shape(sizes, args.devices), ("tpu", "cuda"))
    for platform, text in lowered.items():
        print(f"lowered for {platform}: {len(text) / 1e6:.1f} MB of StableHLO")


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
