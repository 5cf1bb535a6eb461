"""nanoGPT's character model of Shakespeare, whose linear layers learn their structure.

    python main.py --config=configs/shakespeare_gpt_gaudi.py:text=shakespeare.txt
    python main.py --config=configs/shakespeare_gpt_gaudi.py:text=shakespeare.txt,layer=dense

The text is the file "tinyshakespeare" (1.1 MB), or any other.

Arguments: ``text=PATH``, ``size=cpu|gpu``,
``layer=gaudi|low_rank|monarch|blast|block_sparse|dense``, ``recipe=spread|search|budget|paper``,
``budget=0.5``, ``smoke`` (embedded text); ``attention=``, ``attention_out=`` and ``mlp=`` choose
the layers of a part.

The sizes are nanoGPT's. ``cpu``: 4 layers of 4 heads, 128 wide, windows of 64 characters, 2000
steps of 12 windows, some minutes on two CPU cores. ``gpu``: 6 layers of 6 heads, 384 wide, windows
of 256, 5000 steps of 64, dropout 0.2. The learning rate falls to a tenth along a cosine after 100
steps of warm-up, from 1e-3 (``gpu``, as nanoGPT's) or 4e-3 (``cpu``, where nanoGPT's is four times
too low: docs/learning.md). Both: b2 0.99, weight decay 0.1, gradients clipped at norm 1. The last
tenth of the text is for validation.

Published validation losses of the dense model at 1e-3: 1.88 (cpu) and 1.4697 (gpu), each estimated
on random windows.
"""

from typing import Any

from configs.common import TEXT_ARGUMENTS, parse_arguments, text_config, use_smoke_text
from configs.recipes import paper_from_scratch, use_layer
from gaudi_jax.errors import UserError

SIZES: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": {"depth": 4, "heads": 4, "width": 128, "dropout": 0.0},
        "data": {"block": 64, "batch_size": 12},
        "steps": 2000,
        "learning_rate": 4e-3,
        "scales": {"factor_scale": 1.0, "scale_after_dense": 2.0, "scale_of_spread": 1.0},
    },
    "gpu": {
        "model": {"depth": 6, "heads": 6, "width": 384, "dropout": 0.2},
        "data": {"block": 256, "batch_size": 64},
        "steps": 5000,
        "learning_rate": 1e-3,
        "scales": {"factor_scale": 4.0},
    },
}


def get_config(arguments: str | None = None):
    args = parse_arguments(arguments, TEXT_ARGUMENTS | {"budget": 0.5, "text": "", "size": "cpu"})
    if args["size"] not in SIZES:
        raise UserError(f"unknown size {args['size']!r}; use {' or '.join(SIZES)}")
    if args["smoke"]:
        args.reject("text", "size", because="beside smoke")
    elif not args["text"]:
        raise UserError("this config needs a text file: add text=PATH to its arguments")
    size = SIZES[args["size"]]
    config = text_config()
    config.data.update(name=f"text:{args['text']}", **size["data"])
    with config.unlocked():
        config.model.update(size["model"])
    config.optimizer.update(
        learning_rate=size["learning_rate"],
        structural_learning_rate=1e-3,
        location_learning_rate=1e-4,
        warmup=100 / size["steps"],
        end_factor=0.1,
        weight_decay=0.1,
        b2=0.99,
        clip_norm=1.0,
    )
    # nanoGPT's learning rate leaves room above it (docs/learning.md).
    use_layer(config, args, paper=paper_from_scratch(target=0.15, strength=2.0), **size["scales"])
    config.train.update(steps=size["steps"], log_every=25, eval_every=250)
    config.checkpoint.every = 250
    if args["smoke"]:
        use_smoke_text(config)
    return config
