"""Makes hf_gpt2_tiny: a tiny random GPT-2 of transformers, with what it computes.

Run with torch 2.13 and transformers 5 (neither torch nor this script is needed by the tests):

    python tests/data/golden/make_hf_gpt2.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

FOLDER = Path(__file__).parent / "hf_gpt2_tiny"


def main():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61,
        n_positions=24,
        n_embd=12,
        n_layer=2,
        n_head=3,
        n_inner=20,
        layer_norm_epsilon=1e-2,  # large enough to show in the logits
        # No token ends a generation, so that the continuations have one length.
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # far from the initial values, all of which are nearly or exactly 0 or 1
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(FOLDER)

    token_ids = torch.randint(config.vocab_size, (3, 17))
    output = model(token_ids, labels=token_ids)
    output.loss.backward()
    arrays = {
        "token_ids": token_ids.numpy().astype(np.int32),
        "logits": output.logits.detach().numpy(),
        "loss": output.loss.detach().numpy(),
    }
    for name, parameter in model.named_parameters():
        arrays[f"gradient/{name}"] = parameter.grad.numpy()
    continued = model.generate(token_ids[:, :9], max_new_tokens=15, do_sample=False, pad_token_id=0)
    arrays["greedy"] = continued[:, 9:].numpy().astype(np.int32)
    np.savez_compressed(FOLDER / "computed.npz", **arrays)


main()
