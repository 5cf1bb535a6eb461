"""What the configs share: the sections, their defaults, and the argument string."""

import math
from typing import Any

from ml_collections import ConfigDict, config_dict

from gaudi_jax.errors import UserError

Argument = Any  # str, float, int or bool


class Arguments(dict[str, Argument]):
    """The arguments of a config with their values.

    Attributes:
        given: those that the text names; the others have their defaults.
    """

    given: frozenset[str] = frozenset()

    def reject(self, *names: str, because: str) -> None:
        """Stops at arguments that were given and would change nothing.

        Raises:
            UserError: one of the names was given.
        """
        for name in names:
            if name in self.given:
                raise UserError(f"config argument {name!r} has no effect {because}; leave it out")


def parse_arguments(text: str | None, defaults: dict[str, Argument]) -> Arguments:
    """Parses ``layer=dense,smoke``: comma-separated key=value, where a bare word means True.

    Args:
        text: what follows the colon in ``--config=FILE:text``.
        defaults: the known arguments with their defaults, whose types the values take.

    Returns:
        The defaults, updated by the text.

    Raises:
        UserError: an argument is unknown, or its value is missing or of another type.
    """
    arguments = Arguments(defaults)
    for word in filter(None, (text or "").split(",")):
        key, has_value, value = word.partition("=")
        if key not in defaults:
            raise UserError(
                f"unknown config argument {key!r}; the arguments are {', '.join(defaults)}"
            )
        kind = type(defaults[key])
        if bool(has_value) == (kind is bool):
            form = key if kind is bool else f"{key}=VALUE"
            raise UserError(f"config argument {word!r} must be written {form}")
        try:
            arguments[key] = True if kind is bool else kind(value)
        except ValueError:
            raise UserError(
                f"config argument {word!r} needs a value like {defaults[key]!r}"
            ) from None
        arguments.given |= {key}
    return arguments


def base_config() -> ConfigDict:
    """Every section with its default, for images; configs change what differs."""
    config = ConfigDict()
    config.task = "images"
    config.seed = 0
    config.init_from = ""  # workdir of a run, or a Hugging Face folder or id, to start from
    config.evaluate_only = False
    config.evaluate_checkpoint = "last"  # best or packed: what the report is about
    # Compiled programs for later runs of the same shapes; empty for none.
    config.compilation_cache = "~/.cache/gaudi_jax/compiled"

    # Devices on each axis of the mesh (gaudi_jax.training.mesh); -1 for all that are left.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    # Processes, where neither Cloud TPUs nor srun nor mpirun tell (gaudi_jax.training.processes).
    config.distributed = ConfigDict(
        {
            "coordinator_address": "",
            "num_processes": -1,
            "process_id": -1,
            "heartbeat_timeout_seconds": 100,
        }
    )

    config.data = ConfigDict(
        {
            "name": "digits",  # digits, folder:PATH, tfds:NAME, generated:CLASSESxSIZExCHANNELS
            "image_size": 8,
            "batch_size": 64,
            "validation_fraction": 0.1,  # held out of training where the data have no such split
            "skip_unreadable": False,
            "verify": False,  # read every image before training
            "workers": 0,  # processes that decode and augment
            "mean": (0.5,),  # of pixels in [0, 1]; one number for all channels, or one each
            "std": (0.5,),
            "crop_padding": 0,  # pixels of zeros around the image before a random crop
            "least_area": 0.0,  # smallest share of a random resized crop in its place; 0 for none
            "crop_fraction": 1.0,  # evaluation: share of the resized image that the crop keeps
            "flip": False,
            "rand_augment": 0.0,  # magnitude of random operations, up to 10; 0 for none
            "random_erasing": 0.0,  # chance that a box of an image is filled with noise
            "label_smoothing": 0.0,
            "mixup": 0.0,
            "cutmix": 0.0,
        }
    )
    config.model = ConfigDict(
        {
            "name": "vit",
            "preset": "",  # such as B/16; sets patch_size, width, depth and heads
            "pool": "class",
            "position_scale": 0.02,
            "norm_epsilon": 1e-6,
            "mlp_ratio": 4.0,
            "dropout": 0.0,
            "drop_path": 0.0,
            "remat": False,  # compute activations twice instead of keeping them
            "dtype": "float32",
        }
    )
    config.layer = ConfigDict({"attention": {"name": "dense"}, "mlp": {"name": "dense"}})
    config.compress = ConfigDict(
        {
            # What the dense layers become: spread (blocks of one size), gaudi (blocks by search),
            # low_rank, monarch, blast, block_sparse or best (of search and low rank).
            "method": "none",
            # (after this share of the steps, multiplications over dense of the layers that match)
            "stages": ((0.0, 0.25),),
            "rules": (("blocks/.*", None),),  # (pattern of paths, budget; None for the stage's)
            "allocation": "global",  # or uniform
            "floor": 0.0,  # share of its uniform budget that each layer keeps in global allocation
            "rank": 1,
            "granularity": 1,
            # Parts of each axis for monarch, blast and block_sparse, None for 4, 4 and 16; the most
            # of them for spread, None for as many as there can be.
            "blocks": config_dict.placeholder(int),
            "calibration_batches": 0,  # of training examples whose outputs are kept; 0 for none
            "rounds": 40,  # effort of a search; a third of the most sweeps that fit spread blocks
        }
    )
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1e-3,
            "schedule": "cosine",  # or linear: how learning rates fall after the warm-up
            "factor_scale": 1.0,  # learning rate of structured layers' factors over the others'
            # Gaudi blocks: more by the root of one over their widths. None is False.
            "scale_by_width": config_dict.placeholder(bool),
            "structural_learning_rate": 1e-3,
            "location_learning_rate": 1e-3,
            "warmup": 0.05,  # fraction of train.steps
            "start_factor": 0.0,  # learning rates before the warm-up, over their peaks
            "end_factor": 0.0,  # and at the end
            "weight_decay": 0.05,
            "b1": 0.9,
            "b2": 0.999,
            "clip_norm": 0.0,  # 0 for none
            "layer_moment": False,
        }
    )
    config.controller = ConfigDict(
        {
            "name": "none",  # none, threshold, mean or budget
            "target": 1.0,  # mean width (threshold, mean), fraction of dense (budget)
            "strength": 0.04,  # threshold only
            "begin": 0.05,  # fractions of train.steps: threshold starts, budget falls from
            "end": 0.5,  # budget: reached here
            "price_by_axis": True,  # budget only
            "floor": 0.0,  # budget only: least share of its dense cost that a layer keeps
        }
    )
    config.sigma = ConfigDict({"start": math.inf, "end": math.inf, "begin": 0.0, "finish": 1.0})
    config.train = ConfigDict(
        {
            "steps": 1000,
            "accumulate": 1,  # micro-batches of a step: less memory, the same step
            "log_every": 20,
            "eval_every": 100,
            # A step whose gradients are not finite is skipped; after so many in a row a run stops.
            "max_skipped": 10,
            "stall_seconds": 600.0,  # without progress, after which a process is named in a warning
        }
    )
    config.checkpoint = ConfigDict({"every": 200, "keep": 2})
    # So many steps (0 for none) after first are traced: what ran when, for TensorBoard and xprof.
    config.profile = ConfigDict({"first": 0, "steps": 0})
    return config


def text_config() -> ConfigDict:
    """Every section with its default, for text."""
    config = base_config()
    config.task = "text"
    config.data = ConfigDict(
        {
            "name": "docs",  # docs, text:PATH, hf:OWNER/NAME:CONFIG, tfds:NAME
            "tokenizer": "chars",  # chars, bpe:VOCAB_SIZE, hf:DIRECTORY_OR_ID
            "block": 128,  # tokens that the model reads at once
            "stride": 0,  # of evaluation windows; 0 is block: side by side
            "batch_size": 16,
            "validation_fraction": 0.1,  # held out of training where the text has no such split
            "test_fraction": 0.0,  # likewise; with 0 the validation text serves
            "cache_dir": "~/.cache/gaudi_jax",  # token ids and trained tokenizers
        }
    )
    config.model = ConfigDict(
        {
            "name": "gpt2",
            "preset": "",  # such as gpt2; sets width, depth and heads
            "vocab_size": config_dict.placeholder(int),  # None is the tokenizer's
            "context": config_dict.placeholder(int),  # None is data.block
            "mlp_ratio": 4.0,
            "fused_qkv": True,
            "norm_epsilon": 1e-5,
            "dropout": 0.0,
            "remat": False,
            "dtype": "float32",
        }
    )
    with config.unlocked():
        config.layer.attention_out = ConfigDict({"name": "dense"})
    return config


#: Arguments that every config which trains from scratch takes.
LAYER_ARGUMENTS: dict[str, Argument] = {
    "layer": "gaudi",  # gaudi, low_rank, monarch, blast, block_sparse or dense
    "attention": "",  # the same for the attention layers alone
    "mlp": "",  # and for the MLPs alone
    "recipe": "search",  # spread, search or budget, or for gaudi paper
    "budget": 0.3,  # multiplications over dense (but for gaudi with recipe=paper)
    "smoke": False,
}
#: Those of text configs; attention_out is the layer that ends the attention. On texts spread blocks
#: end ahead of searched ones, or level (docs/learning.md).
TEXT_ARGUMENTS = LAYER_ARGUMENTS | {"attention_out": "", "recipe": "spread"}


def use_smoke_text(config: ConfigDict) -> None:
    """Shrinks a config to a minute on the embedded text, to see that everything works."""
    config.data.update(name="docs", tokenizer="chars", block=32, batch_size=8, stride=0)
    config.model.update(preset="", dtype="float32")
    with config.unlocked():
        config.model.update(width=32, depth=2, heads=2)
    config.compress.update(rounds=4, calibration_batches=4)
    config.train.update(steps=60, accumulate=min(config.train.accumulate, 2))
    config.train.update(log_every=5, eval_every=20)
    config.checkpoint.every = 20


def use_smoke_data(config: ConfigDict, args: Arguments, image_size: int) -> None:
    """Shrinks a config to a minute on generated images, to see that everything works.

    Raises:
        UserError: an argument has no effect.
    """
    args.reject("data", "epochs", because="beside smoke")
    config.data.update(
        name=f"generated:10x{image_size}x3",
        image_size=image_size,
        batch_size=16,
        workers=0,
        crop_padding=min(config.data.crop_padding, image_size // 8),
    )
    config.model.preset = ""
    with config.unlocked():
        config.model.update(patch_size=image_size // 4, width=64, depth=2, heads=4)
    config.compress.update(rounds=4, calibration_batches=4)
    config.train.update(steps=60, log_every=5, eval_every=20)
    config.checkpoint.every = 20
