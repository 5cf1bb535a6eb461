"""Vision Transformer (Dosovitskiy et al., ICLR 2021, arXiv:2010.11929) as an NNX module."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from gaudi_jax.errors import UserError
from gaudi_jax.layers.factory import LinearFactory
from gaudi_jax.models import hf_vit
from gaudi_jax.models.blocks import through_blocks
from gaudi_jax.models.pretrained import fill, read_config, read_tensors, resolve_folder

log = logging.getLogger(__name__)

#: name: (image size, patch size, width, depth, heads)
PRESETS = {
    "Ti/16": (224, 16, 192, 12, 3),
    "S/16": (224, 16, 384, 12, 6),
    "S/32": (224, 32, 384, 12, 6),
    "B/16": (224, 16, 768, 12, 12),
    "B/32": (224, 32, 768, 12, 12),
    "L/16": (224, 16, 1024, 24, 16),
    "L/32": (224, 32, 1024, 24, 16),
    # The model for 32x32 images of the Gaudi-GBLR paper: wider and shallower than other ViT-S.
    "S/4": (32, 4, 768, 8, 8),
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes and choices of a ViT.

    Attributes:
        image_size: height and width of the images, in pixels.
        patch_size: height and width of a patch; divides image_size.
        channels: channels of the images.
        num_classes: number of logits.
        width: features of a token; a multiple of heads.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: hidden features of the MLP over width (rounded to a whole number of features).
        pool: "class" (a class token) or "mean" (the mean of the patch tokens).
        position_scale: standard deviation of the initial position embedding. 0.02 is usual at
            ImageNet size; small models on small images learn much better from 1.
        norm_epsilon: what layer normalisation adds to the variance.
        dropout: rate after the embedding and after each branch.
        drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first.
        remat: compute activations again in the backward pass instead of keeping them.
        attention_layer: factory of the query, key, value and output layers.
        mlp_layer: factory of both MLP layers.
        dtype: dtype of the computation; None computes in the parameters' dtype.
        param_dtype: dtype of the parameters.

    Example:
        >>> from gaudi_jax.models import ViTConfig
        >>> ViTConfig.preset("B/16", num_classes=10).width
        768
    """

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    num_classes: int = 1000
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    pool: str = "class"
    position_scale: float = 0.02
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    drop_path: float = 0.0
    remat: bool = False
    attention_layer: LinearFactory = nnx.Linear
    mlp_layer: LinearFactory = nnx.Linear
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        """Checks the sizes.

        Raises:
            UserError: a size is not positive, does not divide another, or a choice is unknown.
        """
        for name in ("image_size", "patch_size", "channels", "num_classes", "width", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.norm_epsilon > 0:
            raise UserError(f"norm_epsilon={self.norm_epsilon} must be positive")
        if self.hidden < 1:
            raise UserError(
                f"mlp_ratio={self.mlp_ratio} leaves no hidden features at width={self.width}"
            )
        if self.depth < 0:
            raise UserError(f"depth={self.depth} must not be negative")
        if self.image_size % self.patch_size:
            raise UserError(
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}; "
                "choose a divisor"
            )
        if self.width % self.heads:
            raise UserError(
                f"heads={self.heads} does not divide width={self.width}; choose a divisor"
            )
        if self.pool not in ("class", "mean"):
            raise UserError(f"unknown pool {self.pool!r}; use 'class' or 'mean'")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is outside [0, 1)")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ViTConfig":
        """A standard size by name, such as "B/16", with fields changed as given.

        Raises:
            UserError: the name is unknown.
        """
        if name not in PRESETS:
            raise UserError(f"unknown ViT preset {name!r}; the presets are {', '.join(PRESETS)}")
        image_size, patch_size, width, depth, heads = PRESETS[name]
        sizes = {
            "image_size": image_size,
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "heads": heads,
        }
        return cls(**(sizes | changes))

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def hidden(self) -> int:
        """Hidden features of the MLP."""
        # Rounded, so that hidden / width as a ratio always gives hidden back.
        return round(self.mlp_ratio * self.width)


class ViT(nnx.Module):
    """Vision Transformer with pre-norm blocks and separate query, key, value and output layers.

    Args:
        config: sizes and choices.
        rngs: random keys; the stream "params" is used.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gaudi_jax.models import ViT, ViTConfig
        >>> config = ViTConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2)
        >>> ViT(config, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 3))).shape
        (2, 1000)
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        common = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        patch_features = config.patch_size**2 * config.channels
        self.patch_embedding = nnx.Linear(patch_features, config.width, **common)
        tokens = config.num_patches + (config.pool == "class")
        position_init = nnx.initializers.normal(config.position_scale)
        self.position_embedding = nnx.Param(
            position_init(rngs.params(), (tokens, config.width), config.param_dtype)
        )
        self.class_token: nnx.Param | None = (
            nnx.Param(jnp.zeros((1, config.width), config.param_dtype))
            if config.pool == "class"
            else nnx.data(None)
        )
        self.dropout = nnx.Dropout(config.dropout)
        self.blocks = nnx.List([Block(config, index, rngs=rngs) for index in range(config.depth)])
        self.norm = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, **common)
        self.head = _head(config, rngs=rngs)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        image_size: int | None = None,
        num_classes: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        rngs: nnx.Rngs | None = None,
    ) -> Self:
        """A dense ViT with the weights of a Hugging Face folder, read without PyTorch.

        The folder holds config.json and safetensors of a ``ViTForImageClassification`` or
        ``ViTModel``. The logits are those of transformers for the same pixels, which should be
        prepared as the folder's preprocessor_config.json says. Position embeddings are resized as
        transformers resizes them (`hf_vit.resize_positions`).

        Args:
            name: a directory, or an id on the Hugging Face hub.
            image_size: of the model; None for the file's.
            num_classes: of the model; None for that of config.json. If the file has another number,
                or no head, the model gets a new one, and the log says so.
            dtype: of the computation; None computes in the parameters' dtype.
            param_dtype: of the parameters, whatever the file's.
            dropout: see `ViTConfig`; the rates in the file are not used.
            drop_path: see `ViTConfig`.
            rngs: random keys of a new head, stream "params"; `nnx.Rngs(0)` if not given.

        Raises:
            UserError: the folder cannot be found or read, is no ViT that this model can represent,
                or its tensors do not fit.

        Example:
            >>> from gaudi_jax.models import ViT
            >>> model = ViT.from_pretrained(
            ...     "google/vit-base-patch16-224", num_classes=10, rngs=nnx.Rngs(0)
            ... )  # doctest: +SKIP
        """
        folder = resolve_folder(name)
        source = read_config(folder)
        sizes = hf_vit.sizes(source)
        tensors = read_tensors(folder)
        has_head = "classifier.weight" in tensors
        new_head = not has_head or num_classes not in (None, sizes["num_classes"])

        changes = {"image_size": image_size, "num_classes": num_classes}
        changes = {field: value for field, value in changes.items() if value is not None}
        config = ViTConfig(
            **(sizes | changes),
            dropout=dropout,
            drop_path=drop_path,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
        # What the file lacks becomes an array here, which `fill` leaves alone.
        if new_head:
            log.warning(
                "%s holds no head of %d classes; the model gets a new, untrained one",
                folder,
                config.num_classes,
            )
            model.head = _head(config, rngs=nnx.Rngs(0) if rngs is None else rngs)
        if not source.get("qkv_bias", True):
            for block in model.blocks:
                attention: Any = block.attention
                for layer in (attention.query, attention.key, attention.value):
                    layer.bias = nnx.Param(jnp.zeros(config.width, param_dtype))
        return fill(
            model,
            tensors,
            hf_vit.table(sizes, image_size=config.image_size),
            optional=(*hf_vit.UNUSED, hf_vit.HEAD) if new_head else hf_vit.UNUSED,
        )

    def __call__(
        self, images: Float[Array, "B H W C"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B classes"]:
        """Logits of a batch of images.

        Args:
            images: shape (B, image_size, image_size, channels).
            rngs: random keys; the stream "dropout" is used in training if a rate is positive.

        Returns:
            Logits, float32, shape (B, num_classes).

        Raises:
            UserError: the images have another shape.
        """
        config = self.config
        expected = (config.image_size, config.image_size, config.channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise UserError(
                f"images of shape {images.shape} are not (batch, *{expected}); resize them or "
                "change the model's image_size and channels"
            )
        p = config.patch_size
        patches = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
        x = self.patch_embedding(patches)
        if self.class_token is not None:
            token = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, config.width))
            x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
        x = self.dropout(x + self.position_embedding[...].astype(x.dtype), rngs=rngs)
        x = through_blocks(self.blocks, x, rngs=rngs, remat=config.remat)
        x = self.norm(x)
        x = x[:, 0] if config.pool == "class" else x.mean(axis=1)
        return self.head(x).astype(jnp.float32)


def _head(config: ViTConfig, *, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        config.width,
        config.num_classes,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


class Block(nnx.Module):
    """Pre-norm transformer block: attention and MLP, each on a residual branch.

    Args:
        config: sizes and choices of the ViT.
        index: place of the block in the ViT, from 0; sets its rate of stochastic depth.
        rngs: random keys.
    """

    def __init__(self, config: ViTConfig, index: int, *, rngs: nnx.Rngs):
        common = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        self.attention_norm = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, **common)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, **common)
        self.mlp = MLP(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)
        # One draw per image drops the whole branch: stochastic depth (arXiv:1603.09382).
        rate = config.drop_path * index / max(config.depth - 1, 1)
        self.drop_path = nnx.Dropout(rate, broadcast_dims=(1, 2))

    def __call__(
        self, x: Float[Array, "B T D"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B T D"]:
        """Maps tokens to tokens."""

        def branch(y: Array) -> Array:
            return self.drop_path(self.dropout(y, rngs=rngs), rngs=rngs)

        x = x + branch(self.attention(self.attention_norm(x)))
        return x + branch(self.mlp(self.mlp_norm(x)))


class Attention(nnx.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        common = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        self.query = config.attention_layer(config.width, config.width, **common)
        self.key = config.attention_layer(config.width, config.width, **common)
        self.value = config.attention_layer(config.width, config.width, **common)
        self.out = config.attention_layer(config.width, config.width, **common)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Maps tokens to tokens."""
        query, key, value = (
            rearrange(layer(x), "b t (n h) -> b t n h", n=self.heads)
            for layer in (self.query, self.key, self.value)
        )
        attended = jax.nn.dot_product_attention(query, key, value)
        return self.out(rearrange(attended, "b t n h -> b t (n h)"))


class MLP(nnx.Module):
    """Two layers with a GELU between them."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        common = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        self.fc1 = config.mlp_layer(config.width, config.hidden, **common)
        self.fc2 = config.mlp_layer(config.hidden, config.width, **common)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Maps tokens to tokens."""
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))
