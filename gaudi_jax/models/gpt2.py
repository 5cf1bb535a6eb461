"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019) in NNX."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file

from gaudi_jax.errors import UserError
from gaudi_jax.layers.factory import LinearFactory
from gaudi_jax.models import hf_gpt2
from gaudi_jax.models.blocks import through_blocks
from gaudi_jax.models.pretrained import (
    INDEX,
    SHARDS,
    WEIGHTS,
    fill,
    read_config,
    read_tensors,
    resolve_folder,
)

#: name: (width, depth, heads)
PRESETS = {
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Sizes and choices of a GPT-2; the defaults are those of the smallest published one.

    Attributes:
        vocab_size: number of token ids, and of logits.
        context: most tokens that the model sees at once.
        width: features of a token; a multiple of heads.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: hidden features of the MLP over width (rounded to a whole number of features).
        fused_qkv: one layer of width -> 3·width makes queries, keys and values, as in the published
            model; otherwise three layers of width -> width.
        norm_epsilon: what layer normalisation adds to the variance.
        dropout: rate after the embedding and after each branch. Attention weights are not dropped.
        remat: compute activations again in the backward pass instead of keeping them.
        attention_layer: factory of the layers that make queries, keys and values.
        attention_out_layer: factory of the attention's output layer.
        mlp_layer: factory of both MLP layers.
        dtype: dtype of the computation; None computes in the parameters' dtype.
        param_dtype: dtype of the parameters.

    Example:
        >>> from gaudi_jax.models import GPT2Config
        >>> GPT2Config.preset("gpt2-medium", context=256).width
        1024
    """

    vocab_size: int = 50257
    context: int = 1024
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    fused_qkv: bool = True
    norm_epsilon: float = 1e-5
    dropout: float = 0.0
    remat: bool = False
    attention_layer: LinearFactory = nnx.Linear
    attention_out_layer: LinearFactory = nnx.Linear
    mlp_layer: LinearFactory = nnx.Linear
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        """Checks the sizes.

        Raises:
            UserError: a size is not positive, does not divide another, or a rate is out of range.
        """
        for name in ("vocab_size", "context", "width", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")
        if self.depth < 0:
            raise UserError(f"depth={self.depth} must not be negative")
        if self.hidden < 1:
            raise UserError(
                f"mlp_ratio={self.mlp_ratio} leaves no hidden features at width={self.width}"
            )
        if self.width % self.heads:
            raise UserError(
                f"heads={self.heads} does not divide width={self.width}; choose a divisor"
            )
        if not self.norm_epsilon > 0:
            raise UserError(f"norm_epsilon={self.norm_epsilon} must be positive")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} is outside [0, 1)")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GPT2Config":
        """A published size by name, such as "gpt2-medium", with fields changed as given.

        Raises:
            UserError: the name is unknown.
        """
        if name not in PRESETS:
            raise UserError(f"unknown GPT-2 preset {name!r}; the presets are {', '.join(PRESETS)}")
        width, depth, heads = PRESETS[name]
        return cls(**({"width": width, "depth": depth, "heads": heads} | changes))

    @property
    def hidden(self) -> int:
        """Hidden features of the MLP."""
        return round(self.mlp_ratio * self.width)


class KeysValues(NamedTuple):
    """What an attention layer remembers of the tokens it has seen.

    Attributes:
        keys: shape (B, length, heads, head features).
        values: likewise.
    """

    keys: Float[Array, "B S heads H"]
    values: Float[Array, "B S heads H"]


#: One `KeysValues` a block.
Cache = tuple[KeysValues, ...]


class GPT2(nnx.Module):
    """GPT-2: a causal pre-norm transformer whose head is tied to the token embedding.

    Kernels and embeddings start from a normal distribution of standard deviation 0.02, and those at
    the end of a branch from one of 0.02 / sqrt(2·depth), since 2·depth branches add up.

    Args:
        config: sizes and choices.
        rngs: random keys; the stream "params" is used.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gaudi_jax.models import GPT2, GPT2Config
        >>> config = GPT2Config(vocab_size=50, context=8, width=16, depth=1, heads=2)
        >>> GPT2(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).shape
        (1, 3, 50)
    """

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.config = config
        common = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        init = nnx.initializers.normal(0.02)
        self.token_embedding = TiedEmbed(
            config.vocab_size, config.width, embedding_init=init, **common
        )
        self.position_embedding = nnx.Param(
            init(rngs.params(), (config.context, config.width), config.param_dtype)
        )
        self.dropout = nnx.Dropout(config.dropout)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, **common)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        fused_qkv: bool = True,
        dropout: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ) -> Self:
        """A dense GPT-2 with the weights of a Hugging Face folder, read without PyTorch.

        The folder holds config.json and safetensors of a ``GPT2LMHeadModel`` or ``GPT2Model``. The
        logits are those of transformers for the same token ids.

        Args:
            name: a directory, or an id on the Hugging Face hub, such as "openai-community/gpt2".
            fused_qkv: see `GPT2Config`.
            dropout: see `GPT2Config`; the rates in the file are not used.
            dtype: of the computation; None computes in the parameters' dtype.
            param_dtype: of the parameters, whatever the file's.

        Raises:
            UserError: the folder cannot be found or read, is no GPT-2 that this model can
                represent, or its tensors do not fit.

        Example:
            >>> from gaudi_jax.models import GPT2
            >>> model = GPT2.from_pretrained("openai-community/gpt2")  # doctest: +SKIP
        """
        folder = resolve_folder(name)
        config = GPT2Config(
            **hf_gpt2.sizes(read_config(folder)),
            fused_qkv=fused_qkv,
            dropout=dropout,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        abstract = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
        table = hf_gpt2.table(fused_qkv=fused_qkv)
        return fill(abstract, read_tensors(folder), table, optional=hf_gpt2.UNUSED)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a folder that transformers loads as ``GPT2LMHeadModel``: config and safetensors.

        Structured kernels are written dense, as they are in evaluation, so that the folder computes
        the same logits, at the dense cost. A tokenizer is not written.

        Args:
            directory: made if need be; a model that it holds is replaced.

        Raises:
            UserError: the directory is a file.

        Example:
            >>> import tempfile
            >>> from flax import nnx
            >>> from gaudi_jax.models import GPT2, GPT2Config
            >>> config = GPT2Config(vocab_size=50, context=8, width=16, depth=1, heads=2)
            >>> with tempfile.TemporaryDirectory() as directory:
            ...     GPT2(config, rngs=nnx.Rngs(0)).save_pretrained(directory)
            ...     GPT2.from_pretrained(directory).config == config
            True
        """
        folder = Path(directory)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; give a directory")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = hf_gpt2.exported_tensors(nnx.view(self, deterministic=True))
        # transformers refuses files that do not say which framework laid the tensors out.
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        # What is left of a model in several files would only mislead.
        for stale in [folder / INDEX, *folder.glob(SHARDS)]:
            stale.unlink(missing_ok=True)
        config = hf_gpt2.exported_config(self.config)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def __call__(
        self, token_ids: Int[Array, "B T"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B T vocab"]:
        """Logits of the token that follows each token.

        Args:
            token_ids: shape (B, T), T <= context, values in [0, vocab_size).
            rngs: random keys; the stream "dropout" is used in training if the rate is positive.

        Returns:
            Logits, float32, shape (B, T, vocab_size).

        Raises:
            UserError: the shape is another, or T exceeds the context.
        """
        if token_ids.ndim != 2 or token_ids.shape[1] > self.config.context:
            raise UserError(
                f"token ids of shape {token_ids.shape} are not (batch, at most "
                f"{self.config.context}); cut them, or give the model a longer context"
            )
        x = self.token_embedding(token_ids)
        x = x + self.position_embedding[: token_ids.shape[1]].astype(x.dtype)
        x = self.dropout(x, rngs=rngs)
        x = through_blocks(self.blocks, x, rngs=rngs, remat=self.config.remat)
        return self.logits(self.norm(x))

    def logits(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch vocab"]:
        """Logits, float32, of normalised features: the tied head."""
        return self.token_embedding.attend(x)

    def empty_cache(self, batch_size: int, length: int) -> Cache:
        """A cache for `extend` with room for `length` tokens a row, at most the context."""
        config = self.config
        shape = (batch_size, length, config.heads, config.width // config.heads)
        empty = jnp.zeros(shape, config.dtype or config.param_dtype)
        return (KeysValues(empty, empty),) * config.depth

    def extend(
        self, token_ids: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Reads more tokens, given the keys and values of those before them.

        A token sees what the cache holds at its own and at all smaller positions, so positions may
        differ from row to row, and what stands at larger ones (padding) does no harm.

        Args:
            token_ids: shape (B, T).
            positions: places of the tokens in their rows, shape (B, T).
            cache: from `empty_cache`, or from an earlier call.

        Returns:
            Normalised features, shape (B, T, width), to be given to `logits`, and the cache with
            these tokens in it.
        """
        x = self.token_embedding(token_ids)
        x = x + self.position_embedding[...][positions].astype(x.dtype)
        extended = []
        for block, known in zip(self.blocks, cache, strict=True):
            x, known = block.extend(x, positions, known)
            extended.append(known)
        return self.norm(x), tuple(extended)


class TiedEmbed(nnx.Embed):
    """An embedding whose logits are float32 in any dtype: in bfloat16 many of them would tie."""

    def attend(self, query: Float[Array, "*batch D"], out_sharding: Any = None) -> Array:
        """Logits, float32, of features."""
        embedding = self.embedding[...].astype(query.dtype)
        return jnp.matmul(
            query, embedding.T, preferred_element_type=jnp.float32, out_sharding=out_sharding
        )


class Block(nnx.Module):
    """Pre-norm transformer block: attention and MLP, each on a residual branch."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        common = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        self.attention_norm = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, **common)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(config.width, epsilon=config.norm_epsilon, **common)
        self.mlp = MLP(config, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self, x: Float[Array, "B T D"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B T D"]:
        """Maps tokens to tokens."""
        x = x + self.dropout(self.attention(self.attention_norm(x)), rngs=rngs)
        return x + self.dropout(self.mlp(self.mlp_norm(x)), rngs=rngs)

    def extend(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], known: KeysValues
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """Maps more tokens to tokens, given the keys and values of those before them."""
        attended, known = self.attention.extend(self.attention_norm(x), positions, known)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), known


class Attention(nnx.Module):
    """Multi-head self-attention in which a token sees itself and those before it."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        self.heads = config.heads
        common = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        init = nnx.initializers.normal(0.02)
        width = config.width
        self.fused_qkv = config.fused_qkv
        if config.fused_qkv:
            self.qkv = config.attention_layer(width, 3 * width, kernel_init=init, **common)
        else:
            self.query = config.attention_layer(width, width, kernel_init=init, **common)
            self.key = config.attention_layer(width, width, kernel_init=init, **common)
            self.value = config.attention_layer(width, width, kernel_init=init, **common)
        self.out = config.attention_out_layer(
            width, width, kernel_init=_branch_init(config), **common
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Maps tokens to tokens."""
        query, key, value = self._queries_keys_values(x)
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.out(attended.reshape(x.shape))

    def extend(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], known: KeysValues
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """Maps more tokens to tokens, given the keys and values of those before them."""
        query, key, value = self._queries_keys_values(x)
        rows = jnp.arange(len(x))[:, None]
        known = KeysValues(
            known.keys.at[rows, positions].set(key), known.values.at[rows, positions].set(value)
        )
        visible = jnp.arange(known.keys.shape[1]) <= positions[:, None, :, None]
        attended = jax.nn.dot_product_attention(query, *known, mask=visible)
        return self.out(attended.reshape(x.shape)), known

    def _queries_keys_values(self, x: Float[Array, "B T D"]) -> list[Float[Array, "B T heads H"]]:
        if self.fused_qkv:
            parts = jnp.split(self.qkv(x), 3, axis=-1)
        else:
            parts = [self.query(x), self.key(x), self.value(x)]
        return [part.reshape(*x.shape[:2], self.heads, -1) for part in parts]


class MLP(nnx.Module):
    """Two layers with a GELU between them, in the approximation that GPT-2 was trained with."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        common = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        self.fc1 = config.mlp_layer(
            config.width, config.hidden, kernel_init=nnx.initializers.normal(0.02), **common
        )
        self.fc2 = config.mlp_layer(
            config.hidden, config.width, kernel_init=_branch_init(config), **common
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Maps tokens to tokens."""
        return self.fc2(nnx.gelu(self.fc1(x), approximate=True))


def _branch_init(config: GPT2Config) -> nnx.Initializer:
    """Of the layer that ends a branch."""
    return nnx.initializers.normal(0.02 / math.sqrt(2 * config.depth))
