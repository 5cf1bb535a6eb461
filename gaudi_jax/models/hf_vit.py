"""Sizes and weights of Hugging Face's ViT (transformers 4 and 5), translated into ours."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float

from gaudi_jax.errors import UserError
from gaudi_jax.models.pretrained import Table

#: Tensors without a counterpart in our model: the tanh layer over the class token and what masked
#: image modelling adds.
UNUSED = (r"(vit\.)?pooler\..*", r"(vit\.)?embeddings\.mask_token", r"decoder\..*")
HEAD = r"classifier\..*"

#: Modules of a block: ours, and the files' (transformers 5 renamed them, but writes the old names
#: unless it is told otherwise).
BLOCK = {
    "attention_norm": r"layernorm_before",
    "attention.query": r"attention\.(?:attention\.query|q_proj)",
    "attention.key": r"attention\.(?:attention\.key|k_proj)",
    "attention.value": r"attention\.(?:attention\.value|v_proj)",
    "attention.out": r"attention\.(?:output\.dense|o_proj)",
    "mlp_norm": r"layernorm_after",
    "mlp.fc1": r"(?:intermediate\.dense|mlp\.fc1)",
    "mlp.fc2": r"(?:output\.dense|mlp\.fc2)",
}


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ViTConfig` that a config.json describes.

    Dropout rates are left out: they belong to a training run, not to the weights.

    Args:
        config: contents of the config.json of a ``ViTForImageClassification`` or ``ViTModel``;
            what it leaves out has the default of transformers.

    Raises:
        UserError: it is no ViT's, or describes one that our model cannot represent.

    Example:
        >>> from gaudi_jax.models.hf_vit import sizes
        >>> sizes({"model_type": "vit", "hidden_size": 192, "num_attention_heads": 3})["heads"]
        3
    """
    if config.get("model_type") != "vit":
        raise UserError(
            f"config.json has model_type={config.get('model_type')!r}, which is not a ViT; give a "
            "folder with model_type 'vit'"
        )
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise UserError(
            f"config.json has hidden_act={activation!r}, but our ViT computes only the exact "
            "'gelu'; choose another model"
        )
    width = config.get("hidden_size", 768)
    if not isinstance(width, int) or width < 1:
        raise UserError(f"config.json has hidden_size={width!r}, which is no width; fetch it again")
    return {
        "image_size": _side(config, "image_size", 224),
        "patch_size": _side(config, "patch_size", 16),
        "channels": config.get("num_channels", 3),
        # transformers does not write the labels when there are two, its default.
        "num_classes": len(config.get("id2label") or (0, 1)),
        "width": width,
        "depth": config.get("num_hidden_layers", 12),
        "heads": config.get("num_attention_heads", 12),
        "mlp_ratio": config.get("intermediate_size", 3072) / width,
        "norm_epsilon": config.get("layer_norm_eps", 1e-12),
    }


def normalization(preprocessor: Mapping[str, Any]) -> dict[str, list[float]]:
    """Mean and standard deviation by which pixels in [0, 1] are normalised before the model.

    Args:
        preprocessor: contents of the folder's preprocessor_config.json.

    Example:
        >>> from gaudi_jax.models.hf_vit import normalization
        >>> normalization({"image_mean": [0.4, 0.4, 0.3]})
        {'mean': [0.4, 0.4, 0.3], 'std': [0.5, 0.5, 0.5]}
    """
    return {name: preprocessor.get(f"image_{name}") or [0.5] * 3 for name in ("mean", "std")}


def table(sizes: Mapping[str, Any], *, image_size: int) -> Table:
    """The table of `pretrained.fill` for our ViT.

    Args:
        sizes: of the file, as the function `sizes` gives them.
        image_size: of our model.

    Example:
        >>> import re
        >>> from gaudi_jax.models import hf_vit
        >>> rows = hf_vit.table(hf_vit.sizes({"model_type": "vit"}), image_size=384)
        >>> [row[0] for name, row in rows.items() if re.fullmatch(name, "vit.layernorm.bias")]
        ['norm.bias']
    """
    patch_size, channels = sizes["patch_size"], sizes["channels"]
    embed = r"(?:vit\.)?embeddings\."
    patches = embed + r"patch_embeddings\.projection\."
    block = r"(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\."
    resize = functools.partial(
        resize_positions, old=sizes["image_size"] // patch_size, new=image_size // patch_size
    )
    flatten = functools.partial(
        rearrange, pattern="d c p q -> (p q c) d", c=channels, p=patch_size, q=patch_size
    )
    rows: dict[str, Any] = {
        embed + "cls_token": ("class_token", lambda token: token[0]),
        embed + "position_embeddings": ("position_embedding", resize),
        patches + "weight": ("patch_embedding.kernel", flatten),
        patches + "bias": ("patch_embedding.bias", None),
    }
    modules = {rf"{block}{theirs}": rf"blocks.\1.{ours}" for ours, theirs in BLOCK.items()}
    modules |= {r"(?:vit\.)?layernorm": "norm", "classifier": "head"}
    for theirs, ours in modules.items():
        weight = ("scale", None) if ours.endswith("norm") else ("kernel", np.transpose)
        rows[rf"{theirs}\.weight"] = (f"{ours}.{weight[0]}", weight[1])
        rows[rf"{theirs}\.bias"] = (f"{ours}.bias", None)
    return rows


def resize_positions(
    embedding: Float[np.ndarray, "1 tokens D"], *, old: int, new: int
) -> Float[np.ndarray, "new_tokens D"]:
    """Position embeddings on another grid of patches; the class token keeps its own.

    Bicubic exactly as transformers does it (``torch.nn.functional.interpolate`` without corner
    alignment): Keys' kernel with a = -0.75, borders repeated and, although it would be better when
    the grid shrinks, no antialiasing. `jax.image.resize` has a = -0.5 and gives other numbers.

    Args:
        embedding: shape (1, 1 + old², D); the class token comes first.
        old: patches a side in the file.
        new: patches a side of our model.

    Returns:
        Shape (1 + new², D); float32 if the grid changes, else the same values.

    Raises:
        ValueError: the embedding has another number of tokens.

    Example:
        >>> import numpy as np
        >>> from gaudi_jax.models.hf_vit import resize_positions
        >>> resize_positions(np.ones((1, 1 + 4, 8)), old=2, new=3).shape
        (10, 8)
    """
    if embedding.ndim != 3 or embedding.shape[:2] != (1, 1 + old**2):
        raise ValueError(f"{embedding.shape} is not (1, {1 + old**2}, width)")
    if old == new:
        return embedding[0]
    tokens = embedding[0].astype(np.float32)
    grid = rearrange(tokens[1:], "(h w) d -> h w d", h=old)
    weights = _bicubic_weights(old, new)
    resized = np.einsum("ih,jw,hwd->ijd", weights, weights, grid, optimize=True)
    return np.concatenate([tokens[:1], rearrange(resized, "h w d -> (h w) d")])


def _bicubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Row i has the weights of the old samples in the new sample i."""
    a = -0.75
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old), np.float32)
    for tap in range(-1, 3):
        places = np.floor(centers).astype(int) + tap
        x = np.abs(centers - places)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(
            weights,
            (np.arange(new), np.clip(places, 0, old - 1)),
            np.where(x <= 1, near, far),
        )
    return weights


def _side(config: Mapping[str, Any], name: str, default: int) -> int:
    value = config.get(name, default)
    sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int):
        raise UserError(
            f"config.json has {name}={value}, but our ViT takes squares; choose another model"
        )
    return sides[0]
