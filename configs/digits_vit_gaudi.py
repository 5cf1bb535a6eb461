"""A small ViT on scikit-learn's handwritten digits, whose linear layers learn their structure.

    python main.py                                                    # this config, in runs/
    python main.py --config=configs/digits_vit_gaudi.py:layer=dense --workdir=runs/dense

Arguments: ``layer=gaudi|low_rank|monarch|blast|block_sparse|dense``,
``recipe=budget|spread|search|paper``, ``budget=0.33``, ``smoke``.

1097 training images of 8x8 pixels, 3000 steps of 64: 175 epochs. About a minute on two CPU cores.
Expected test accuracies, over five seeds, are in docs/results.md.
"""

from configs.common import LAYER_ARGUMENTS, base_config, parse_arguments, use_smoke_data
from configs.recipes import paper_from_scratch, use_layer


def get_config(arguments: str | None = None):
    args = parse_arguments(arguments, LAYER_ARGUMENTS | {"recipe": "budget", "budget": 0.33})
    config = base_config()
    config.data.update(name="digits", image_size=8, batch_size=64, crop_padding=1)
    config.model.update(pool="mean", position_scale=1.0)
    with config.unlocked():
        config.model.update(patch_size=2, width=64, depth=2, heads=4)
    config.optimizer.update(
        learning_rate=4e-3, structural_learning_rate=3e-3, location_learning_rate=3e-4
    )
    # The learning rate is as high as dense layers bear; factors over whole axes bear no more.
    use_layer(
        config,
        args,
        paper=paper_from_scratch(target=0.15, strength=1.0),
        scale_after_dense=1.0,
        scale_of_spread=1.0,
    )
    config.train.update(steps=3000, log_every=25, eval_every=250)
    config.checkpoint.every = 250
    if args["smoke"]:
        use_smoke_data(config, args, image_size=8)
    return config
