"""A dense character model of Shakespeare, compressed and fine-tuned.

    python main.py --config=configs/shakespeare_gpt_finetune.py:text=shakespeare.txt
    python main.py --config=configs/shakespeare_gpt_finetune.py:text=shakespeare.txt,dense=WORKDIR

First trains the dense model (``configs/shakespeare_gpt_gaudi.py:layer=dense``) in the workdir's
folder ``dense``, or takes the one of the run that ``dense=`` names, whose text must have had the
same characters.

Arguments: ``text=PATH``, ``size=cpu|gpu``,
``method=gaudi|spread|low_rank|monarch|blast|block_sparse|best``, ``budget=0.44`` (of the blocks'
layers), ``granularity=1``, ``dense=WORKDIR``, ``smoke``.
"""

from configs import shakespeare_gpt_gaudi
from configs.common import parse_arguments
from configs.recipes import use_compression


def get_config(arguments: str | None = None):
    args = parse_arguments(
        arguments,
        {
            "text": "",
            "size": "cpu",
            "method": "gaudi",
            "budget": 0.44,
            "granularity": 1,
            "dense": "",
            "smoke": False,
        },
    )
    # The text is asked for, and what has no effect is named, as for the dense model.
    passed_on = [f"{name}={args[name]}" for name in ("text", "size") if name in args.given]
    passed_on += ["smoke"] if args["smoke"] else []
    dense = shakespeare_gpt_gaudi.get_config(",".join(["layer=dense", *passed_on]))
    config = dense.copy_and_resolve_references()
    use_compression(config, args, dense)
    config.optimizer.update(learning_rate=3e-4, end_factor=0.0)
    if args["smoke"]:
        config.compress.update(rounds=4, calibration_batches=4)
    else:
        config.train.steps //= 2
    return config
