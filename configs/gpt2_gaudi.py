"""GPT-2 small on WikiText-103, from its pretrained weights, with layers that learn their structure.

    python main.py --config=configs/gpt2_gaudi.py --workdir=runs/gpt2
    python main.py --config=configs/gpt2_gaudi.py:layer=dense --workdir=runs/gpt2_dense

Arguments: ``layer=gaudi|low_rank|monarch|blast|block_sparse|dense``,
``recipe=paper|budget|spread|search``, ``budget=0.44``, ``epochs=10`` (of WikiText-103's 225 steps;
for another text set ``--config.train.steps``), ``init=openai-community/gpt2`` (Hugging Face folder
or id; its tokenizer is used), ``micro=8`` (windows that are worked through at once),
``data=hf:Salesforce/wikitext:wikitext-103-raw-v1`` (or ``text:FOLDER`` of train.txt, validation.txt
and test.txt), ``smoke`` (embedded text).

The queries, keys and values and both MLP layers become structured, the attention's output layer
stays dense. They start from the truncated SVD of the pretrained kernels.

The paper's recipe: windows of 1024 tokens, batches of 512, 10 epochs, learning rates 1.5e-3 with an
epoch of warm-up and then linear decay, weight decay 0.1, gradients clipped at norm 1; hard masks,
a quarter of the blocks at full width at first, evenly spaced, and a mean width of 0.25 kept.
About 117.9 million training tokens make 225 steps an epoch. ``recipe=budget`` lets a budget of
multiplications fall instead. ``python -m gaudi_jax.report WORKDIR --stride=512`` evaluates a
finished run with sliding windows.

Published perplexities on the test text: dense 19.36, Gaudi-GBLR 19.24 (the authors' README: 18.98)
at 43.7 % of the multiplications. Hardware: a GPU or TPU. Not measured with this code yet.
"""

from configs.common import TEXT_ARGUMENTS, parse_arguments, text_config, use_smoke_text
from configs.recipes import Recipe, use_layer
from gaudi_jax.errors import UserError

TRAIN_TOKENS = 117_920_140
BATCH_SIZE, BLOCK = 512, 1024
PAPER = Recipe(
    sigma={},
    controller={"name": "mean", "target": 0.25},
    layer={"widths": "leading", "density": 0.25, "locations": "spaced"},
)


def get_config(arguments: str | None = None):
    args = parse_arguments(
        arguments,
        TEXT_ARGUMENTS
        | {
            "attention_out": "dense",
            "recipe": "paper",
            "budget": 0.44,
            "epochs": 10,
            "init": "openai-community/gpt2",
            "micro": 8,
            "data": "hf:Salesforce/wikitext:wikitext-103-raw-v1",
        },
    )
    if args["micro"] < 1 or BATCH_SIZE % args["micro"]:
        raise UserError(f"micro={args['micro']} does not divide the batch of {BATCH_SIZE} windows")
    if args["epochs"] < 2:
        raise UserError(f"epochs={args['epochs']} must be at least 2: the first is the warm-up")
    config = text_config()
    config.init_from = args["init"]
    config.data.update(
        name=args["data"], tokenizer=f"hf:{args['init']}", block=BLOCK, batch_size=BATCH_SIZE
    )
    config.model.update(preset="gpt2", context=BLOCK, dropout=0.1, dtype="bfloat16")
    config.optimizer.update(
        learning_rate=1.5e-3,
        structural_learning_rate=1.5e-3,
        location_learning_rate=1.5e-3,
        schedule="linear",
        warmup=1 / args["epochs"],
        weight_decay=0.1,
        clip_norm=1.0,
    )
    # Leading blocks: the truncated SVD of the pretrained kernels, in one piece.
    use_layer(config, args, paper=PAPER, widths="leading")
    steps = TRAIN_TOKENS * args["epochs"] // (BLOCK * BATCH_SIZE)
    config.train.update(
        steps=steps, accumulate=BATCH_SIZE // args["micro"], log_every=10, eval_every=225
    )
    config.checkpoint.every = 225
    if args["smoke"]:
        args.reject("data", "epochs", "init", "micro", because="beside smoke")
        config.init_from = ""
        use_smoke_text(config)
    return config
