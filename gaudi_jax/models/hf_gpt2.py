"""How Hugging Face's GPT-2 names its sizes and weights, and what becomes of them, both ways.

Its linear layers hold kernels as (in, out), as ours do, so that nothing is transposed.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from gaudi_jax.errors import UserError
from gaudi_jax.layers.base import StructuredLinear
from gaudi_jax.models.pretrained import Table

#: Tensors without a counterpart in our model: the causal masks that older files hold, and copies of
#: the tied head.
UNUSED = (r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", r"lm_head\.weight")

#: Modules of a block: ours, and the files'; queries, keys and values apart.
BLOCK = {
    "attention_norm": "ln_1",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
PARTS = ("query", "key", "value")

#: Choices of a config.json that our model has made: key, the values it can represent (the first one
#: is the default of transformers).
FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # one function under two names
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `GPT2Config` that a config.json describes.

    Dropout rates are left out: they belong to a training run, not to the weights.

    Args:
        config: contents of the config.json of a ``GPT2LMHeadModel`` or ``GPT2Model``; what it
            leaves out has the default of transformers.

    Raises:
        UserError: it is no GPT-2's, or describes one that our model cannot represent.

    Example:
        >>> from gaudi_jax.models.hf_gpt2 import sizes
        >>> sizes({"model_type": "gpt2", "n_embd": 1024, "n_head": 16})["width"]
        1024
    """
    if config.get("model_type") != "gpt2":
        raise UserError(
            f"config.json has model_type={config.get('model_type')!r}, which is not a GPT-2; give "
            "a folder with model_type 'gpt2'"
        )
    for name, known in FIXED.items():
        if config.get(name, known[0]) not in known:
            raise UserError(
                f"config.json has {name}={config[name]!r}, but our GPT-2 computes only "
                f"{known[0]!r}; choose another model"
            )
    width = config.get("n_embd", 768)
    return {
        "vocab_size": config.get("vocab_size", 50257),
        "context": config.get("n_positions", 1024),
        "width": width,
        "depth": config.get("n_layer", 12),
        "heads": config.get("n_head", 12),
        "mlp_ratio": (config.get("n_inner") or 4 * width) / width,
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
    }


def table(*, fused_qkv: bool) -> Table:
    r"""The table of `pretrained.fill` for our GPT-2.

    Args:
        fused_qkv: whether our model makes queries, keys and values by one layer, as the files do.

    Example:
        >>> from gaudi_jax.models.hf_gpt2 import table
        >>> table(fused_qkv=True)[r"(?:transformer\.)?wte\.weight"]
        ('token_embedding.embedding', None)
    """
    top = r"(?:transformer\.)?"
    block = top + r"h\.(\d+)\."
    rows: dict[str, Any] = {
        top + r"wte\.weight": ("token_embedding.embedding", None),
        top + r"wpe\.weight": ("position_embedding", None),
    }
    modules = {block + theirs.replace(".", r"\."): rf"blocks.\1.{o}" for o, theirs in BLOCK.items()}
    modules[top + "ln_f"] = "norm"
    qkv = block + r"attn\.c_attn"
    if fused_qkv:
        modules[qkv] = r"blocks.\1.attention.qkv"
    for theirs, ours in modules.items():
        rows[theirs + r"\.weight"] = (
            f"{ours}.{'scale' if ours.endswith('norm') else 'kernel'}",
            None,
        )
        rows[theirs + r"\.bias"] = (f"{ours}.bias", None)
    if not fused_qkv:
        for place, part in enumerate(PARTS):
            third = functools.partial(_third, place=place)
            # The comment in the regex makes three keys that match the same tensor.
            rows[rf"{qkv}\.weight(?#{part})"] = (rf"blocks.\1.attention.{part}.kernel", third)
            rows[rf"{qkv}\.bias(?#{part})"] = (rf"blocks.\1.attention.{part}.bias", third)
    return rows


def exported_config(config: Any) -> dict[str, Any]:
    """The config.json of a ``GPT2LMHeadModel`` with the sizes of a `GPT2Config`.

    Example:
        >>> from gaudi_jax.models import GPT2Config
        >>> from gaudi_jax.models.hf_gpt2 import exported_config
        >>> exported_config(GPT2Config.preset("gpt2-xl"))["n_head"]
        25
    """
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.hidden,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "dtype": jnp.dtype(config.param_dtype).name,
        # The end of text in the published vocabulary; a smaller one has no such id.
        "bos_token_id": None if config.vocab_size < 50257 else 50256,
        "eos_token_id": None if config.vocab_size < 50257 else 50256,
    }


def exported_tensors(model: Any) -> dict[str, np.ndarray]:
    """The tensors of a ``GPT2LMHeadModel`` by name; structured kernels are written dense.

    Args:
        model: a `GPT2` in evaluation mode, in which masks are hard.
    """
    tensors = {
        "wte.weight": model.token_embedding.embedding[...],
        "wpe.weight": model.position_embedding[...],
        "ln_f.weight": model.norm.scale[...],
        "ln_f.bias": model.norm.bias[...],
    }
    for index, block in enumerate(model.blocks):
        for ours, theirs in BLOCK.items():
            module = functools.reduce(getattr, ours.split("."), block)
            weight, bias = _norm(module) if isinstance(module, nnx.LayerNorm) else _dense(module)
            tensors[f"h.{index}.{theirs}.weight"] = weight
            tensors[f"h.{index}.{theirs}.bias"] = bias
        attention = block.attention
        parts = ["qkv"] if attention.fused_qkv else PARTS
        kernels, biases = zip(*(_dense(getattr(attention, part)) for part in parts), strict=True)
        tensors[f"h.{index}.attn.c_attn.weight"] = jnp.concatenate(kernels, axis=1)
        tensors[f"h.{index}.attn.c_attn.bias"] = jnp.concatenate(biases)
    return {f"transformer.{name}": np.asarray(tensor) for name, tensor in tensors.items()}


def _third(tensor: np.ndarray, place: int) -> np.ndarray:
    return np.split(tensor, 3, axis=-1)[place]


def _norm(module: Any) -> tuple[Float[Array, " D"], Float[Array, " D"]]:
    return module.scale[...], module.bias[...]


def _dense(layer: Any) -> tuple[Float[Array, "in out"], Float[Array, " out"]]:
    """Kernel and bias of a linear layer of any kind; zeros for no bias."""
    kernel = layer.kernel() if isinstance(layer, StructuredLinear) else layer.kernel[...]
    if layer.bias is None:
        return kernel, jnp.zeros(kernel.shape[1], kernel.dtype)
    return kernel, layer.bias[...]
