"""The paper's ViT-S/4 on CIFAR-10, whose linear layers learn their structure.

    python main.py --config=configs/cifar10_vit_s_gaudi.py --workdir=runs/cifar10
    python main.py --config=configs/cifar10_vit_s_gaudi.py:layer=dense --workdir=runs/cifar10_dense

Arguments: ``layer=gaudi|low_rank|monarch|blast|block_sparse|dense``,
``recipe=search|spread|budget|paper``, ``budget=0.3``, ``size=gpu|cpu``, ``epochs=300``, ``smoke``,
and ``data=tfds:cifar10`` (prepared once with TensorFlow Datasets) or ``data=folder:PATH`` with
``PATH/train/<class>/*``. 5000 training images are held out.

``gpu``: the model is 768 wide with 8 blocks of 8 heads on 4x4 patches. 45 000 images x 300 epochs /
1024 = 13 183 steps. As in the paper: learning rate 5e-4 with a cosine, weight decay 0.05, mixup
0.8, cutmix 1.0, label smoothing 0.1, drop path 0.1; ``recipe=paper`` adds a structural learning
rate of 5e-3. Hardware: one GPU or TPU. Time and accuracy of full runs have not been measured yet.

``cpu``: 96 wide with 4 blocks of 4 heads, 2000 steps of 64 images, without mixup, cutmix and drop
path: some minutes on two CPU cores, and far from converged.
"""

from ml_collections import ConfigDict

from configs.common import LAYER_ARGUMENTS, Arguments, base_config, parse_arguments, use_smoke_data
from configs.recipes import paper_from_scratch, use_layer
from gaudi_jax.errors import UserError

TRAIN_IMAGES = 45_000


def get_config(arguments: str | None = None):
    args = parse_arguments(
        arguments, LAYER_ARGUMENTS | {"data": "tfds:cifar10", "epochs": 300, "size": "gpu"}
    )
    if args["size"] not in ("gpu", "cpu"):
        raise UserError(f"unknown size {args['size']!r}; use gpu or cpu")
    config = base_config()
    config.data.update(
        name=args["data"],
        image_size=32,
        batch_size=1024,
        workers=8,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        crop_padding=4,
        flip=True,
        label_smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
    )
    config.model.update(preset="S/4", drop_path=0.1, dtype="bfloat16")
    config.optimizer.update(
        learning_rate=5e-4,
        structural_learning_rate=5e-3,
        location_learning_rate=5e-3,
        warmup=10 / 300,
        start_factor=1e-3,
        end_factor=0.01,
    )
    use_layer(config, args, paper=paper_from_scratch(target=0.05, strength=0.02))
    steps = TRAIN_IMAGES * args["epochs"] // config.data.batch_size
    config.train.update(steps=steps, log_every=50, eval_every=440)
    config.checkpoint.every = 440
    if args["size"] == "cpu":
        _use_small_model(config, args)
    if args["smoke"]:
        use_smoke_data(config, args, image_size=32)
    return config


def _use_small_model(config: ConfigDict, args: Arguments) -> None:
    args.reject("epochs", because="with size=cpu")
    config.data.update(batch_size=64, workers=0, mixup=0.0, cutmix=0.0)
    config.model.update(preset="", drop_path=0.0, dtype="float32")
    with config.unlocked():
        config.model.update(patch_size=4, width=96, depth=4, heads=4)
    config.optimizer.learning_rate = 1e-3
    config.train.update(steps=2000, log_every=25, eval_every=500)
    config.checkpoint.every = 500
