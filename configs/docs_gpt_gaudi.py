"""A small GPT-2 on Python's own documentation, whose linear layers learn their structure.

    python main.py --config=configs/docs_gpt_gaudi.py
    python main.py --config=configs/docs_gpt_gaudi.py:layer=dense

Arguments: ``layer=gaudi|low_rank|monarch|blast|block_sparse|dense``,
``recipe=spread|search|budget|paper``, ``budget=0.5``, ``smoke``; ``attention=``, ``attention_out=``
and ``mlp=`` choose the layers of a part.

The text is the half megabyte of documentation that Python carries, so that nothing is downloaded;
it differs from one Python version to the next (its hash is in the summary). Its tokens are 512
pieces of words, learned from it. A run takes up to two minutes on two cores and, on
Python 3.11, ends at a test perplexity of 17.4 at half of the multiplications (dense: 16.7, unigram:
202; one seed).
"""

from configs.common import TEXT_ARGUMENTS, parse_arguments, text_config, use_smoke_text
from configs.recipes import paper_from_scratch, use_layer


def get_config(arguments: str | None = None):
    args = parse_arguments(arguments, TEXT_ARGUMENTS | {"budget": 0.5})
    config = text_config()
    config.data.update(name="docs", tokenizer="bpe:512", block=64, batch_size=16, test_fraction=0.1)
    config.model.dropout = 0.1
    with config.unlocked():
        config.model.update(depth=3, heads=4, width=128)
    config.optimizer.update(
        learning_rate=4e-3,
        structural_learning_rate=1e-3,
        location_learning_rate=1e-4,
        end_factor=0.05,
        weight_decay=0.1,
        b2=0.99,
        clip_norm=1.0,
    )
    use_layer(
        config,
        args,
        paper=paper_from_scratch(target=0.15, strength=2.0),
        scale_after_dense=2.0,
        scale_of_spread=1.0,
    )
    config.train.update(steps=1500, log_every=25, eval_every=250)
    config.checkpoint.every = 250
    if args["smoke"]:
        use_smoke_text(config)
    return config
