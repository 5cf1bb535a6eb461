"""A pretrained ViT-B/16, compressed and fine-tuned on ImageNet-1k.

    python main.py --config=configs/vit_b_gaudi_finetune.py --workdir=runs/vit_b_finetune
    python main.py --config=configs/vit_b_gaudi_finetune.py:dense=runs/vit_b_dense

Starts from a Hugging Face folder or id, or from the workdir of a dense run of
``configs/vit_b_gaudi.py:layer=dense``.

Arguments: ``dense=google/vit-base-patch16-224``,
``method=gaudi|spread|low_rank|monarch|blast|block_sparse|best``, ``budget=0.3``, ``granularity=1``,
``epochs=35``, ``data=tfds:imagenet2012`` or ``data=folder:PATH``, ``smoke`` (trains a small dense
model on generated images first).

The paper's recipe: 35 epochs, batches of 1024, learning rate 1e-4 with a cosine, weight decay 0.05,
drop path 0.1; here the structure is found by search on the outputs of 2048 training images, stays
as it is found, and the factors learn at four times the rate. Augmentation is that of
``configs/vit_b_gaudi.py``. Accuracy with this code has not been measured yet.
"""

from configs import vit_b_gaudi
from configs.common import parse_arguments
from configs.recipes import use_compression
from gaudi_jax.training.start import is_run


def get_config(arguments: str | None = None):
    args = parse_arguments(
        arguments,
        {
            "method": "gaudi",
            "budget": 0.3,
            "granularity": 1,
            "dense": "google/vit-base-patch16-224",
            "data": "tfds:imagenet2012",
            "epochs": 35,
            "smoke": False,
        },
    )
    if args["smoke"]:
        args.reject("dense", "data", "epochs", because="beside smoke")
        dense = vit_b_gaudi.get_config("layer=dense,smoke")
        args["dense"] = ""
    else:
        dense = vit_b_gaudi.get_config(f"layer=dense,data={args['data']},epochs={args['epochs']}")
    config = dense.copy_and_resolve_references()
    use_compression(config, args, dense)
    config.optimizer.update(
        learning_rate=1e-4,
        warmup=1 / 35,
        start_factor=0.0,
        end_factor=0.01,
    )
    config.model.drop_path = 0.1
    config.compress.calibration_batches = 2
    if args["smoke"]:
        config.compress.rounds = 4
    elif not is_run(args["dense"]):
        # As the Hugging Face models of this size were trained.
        config.model.norm_epsilon = 1e-12
        config.data.update(mean=(0.5,), std=(0.5,))
    return config
