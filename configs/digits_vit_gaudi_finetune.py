"""A dense ViT on digits, compressed and fine-tuned.

    python main.py --config=configs/digits_vit_gaudi_finetune.py
    python main.py --config=configs/digits_vit_gaudi_finetune.py:dense=WORKDIR,method=low_rank

First trains the dense model (``configs/digits_vit_gaudi.py:layer=dense``) in the workdir's folder
``dense``, or takes the one of the run that ``dense=`` names. That run may have Gaudi layers too:
their blocks are then found anew, on a coarser grid for example, which deploys faster:

    python main.py --config=configs/digits_vit_gaudi_finetune.py:dense=WORKDIR,granularity=16

Arguments: ``method=gaudi|spread|low_rank|monarch|blast|block_sparse|best``, ``budget=0.24`` (of the
transformer blocks' layers; with patch embedding and head it comes to 0.25), ``granularity=1``,
``dense=WORKDIR``, ``smoke``.

About five minutes on two CPU cores. Expected test accuracies are in docs/results.md.
"""

from configs import digits_vit_gaudi
from configs.common import parse_arguments
from configs.recipes import use_compression


def get_config(arguments: str | None = None):
    args = parse_arguments(
        arguments,
        {"method": "gaudi", "budget": 0.24, "granularity": 1, "dense": "", "smoke": False},
    )
    smoke = ",smoke" if args["smoke"] else ""
    dense = digits_vit_gaudi.get_config(f"layer=dense{smoke}")
    config = dense.copy_and_resolve_references()
    use_compression(config, args, dense)
    config.optimizer.learning_rate = 1e-3
    if args["smoke"]:
        config.compress.update(rounds=4, calibration_batches=4)
    else:
        config.train.steps = 1500
    return config
