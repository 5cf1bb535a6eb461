"""ViT-B/16 on ImageNet-1k from scratch, whose linear layers learn their structure.

    python main.py --config=configs/vit_b_gaudi.py --workdir=runs/vit_b_gaudi
    python main.py --config=configs/vit_b_gaudi.py:layer=dense --workdir=runs/vit_b_dense

Arguments: ``layer=gaudi|low_rank|monarch|blast|block_sparse|dense``,
``recipe=search|spread|budget|paper``, ``budget=0.33``, ``epochs=310``, ``smoke``, and
``data=tfds:imagenet2012`` (prepared once with TensorFlow Datasets) or ``data=folder:PATH`` with
``PATH/train/<class>/*`` and ``PATH/validation/<class>/*``.

1 281 167 images x 310 epochs (300 and 10 of cooldown) / 1024 = 387 853 steps. As in the paper:
learning rate 1e-3, 10 epochs of warm-up from 1e-6, a cosine to 1e-5, weight decay 0.05, random
resized crops, RandAugment of magnitude 9, random erasing 0.25, mixup 0.8, cutmix 1.0, label
smoothing 0.1. ``recipe=paper`` adds a structural learning rate of 1e-3, sigma 1 -> 100 and the
threshold controller (0.04, target width 0.12).

Published: dense 78.57-78.7 % top-1 at 17.2 G multiplications, Gaudi-GBLR 78.51 % at 5.65 G.
Hardware: a TPU slice or a node of GPUs. Accuracy with this code has not been measured yet.
"""

from configs.common import LAYER_ARGUMENTS, base_config, parse_arguments, use_smoke_data
from configs.recipes import paper_from_scratch, use_layer

TRAIN_IMAGES = 1_281_167


def get_config(arguments: str | None = None):
    args = parse_arguments(
        arguments,
        LAYER_ARGUMENTS | {"budget": 0.33, "data": "tfds:imagenet2012", "epochs": 310},
    )
    config = base_config()
    config.data.update(
        name=args["data"],
        image_size=224,
        batch_size=1024,
        workers=32,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        least_area=0.08,
        crop_fraction=0.9,
        flip=True,
        rand_augment=9.0,
        random_erasing=0.25,
        label_smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
    )
    config.model.update(preset="B/16", dtype="bfloat16")
    config.optimizer.update(
        learning_rate=1e-3,
        structural_learning_rate=1e-3,
        location_learning_rate=1e-3,
        warmup=10 / 310,
        start_factor=1e-3,
        end_factor=0.01,
    )
    use_layer(config, args, paper=paper_from_scratch(target=0.12, strength=0.04))
    config.compress.calibration_batches = 2  # 2048 images
    steps = TRAIN_IMAGES * args["epochs"] // config.data.batch_size
    config.train.update(steps=steps, log_every=100, eval_every=1251)
    config.checkpoint.every = 1251
    if args["smoke"]:
        use_smoke_data(config, args, image_size=32)
    return config
