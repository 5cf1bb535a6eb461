"""Makes hf_vit_tiny: a tiny random ViT of transformers, with what it computes.

Run with torch 2.13 and transformers 5 (neither torch nor this script is needed by the tests):

    python tests/data/golden/make_hf_vit.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

FOLDER = Path(__file__).parent / "hf_vit_tiny"


def main():
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        layer_norm_eps=1e-2,  # large enough to show in the logits
        num_labels=5,
    )
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():  # far from the initial values, all of which are nearly or exactly 0 or 1
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(FOLDER)

    # The names of transformers 5 itself; save_pretrained writes those of transformers 4.
    arrays = {"names_in_memory": np.array(sorted(model.state_dict()))}
    for size in (8, 6, 10, 14):
        images = torch.randn(3, 3, size, size)
        logits = model(images, interpolate_pos_encoding=size != config.image_size).logits
        arrays[f"images_{size}"] = images.permute(0, 2, 3, 1).numpy()
        arrays[f"logits_{size}"] = logits.detach().numpy()
    np.savez_compressed(FOLDER / "logits.npz", **arrays)


main()
