"""Vision transformers: ViT, CLIP's, DINOv2 and SigLIP's.

Dosovitskiy et al. 2021 (https://arxiv.org/abs/2010.11929); CLIP, Radford et al. 2021; DINOv2,
Oquab et al. 2023 (https://arxiv.org/abs/2304.07193); SigLIP, Zhai et al. 2023
(https://arxiv.org/abs/2303.15343).
"""

import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from xlir.config import Choice, Divisor, Flag, Real, Whole, read_field
from xlir.models.layers import LayerNorm, Linear
from xlir.models.transformer import (
    ACTIVATIONS,
    EPSILON,
    RATE,
    WIDTH,
    FeedForward,
    Layers,
    Shape,
    attend,
    rename_layers,
    restore_layers,
)

_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
}
_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_VIT = _BASE | {"model_type": "vit", "hidden_act": "gelu", "layer_norm_eps": 1e-12}
_CLIP = _BASE | {
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_DINOV2 = _BASE | {
    "model_type": "dinov2",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 518,
    "patch_size": 14,
    "mlp_ratio": 4,
}
_SIGLIP = _BASE | {
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
# Hub id -> what its config.json says of the image tower, as far as it matters here.
ARCHITECTURES: dict[str, dict] = {
    "google/vit-base-patch16-224": _VIT,
    "google/vit-base-patch16-224-in21k": _VIT,
    "google/vit-base-patch16-384": _VIT | {"image_size": 384},
    "google/vit-base-patch32-224-in21k": _VIT | {"patch_size": 32},
    "google/vit-large-patch16-224": _VIT | _LARGE,
    "google/vit-large-patch16-224-in21k": _VIT | _LARGE,
    "openai/clip-vit-base-patch32": _CLIP | {"patch_size": 32},
    "openai/clip-vit-base-patch16": _CLIP,
    "openai/clip-vit-large-patch14": _CLIP | _LARGE | {"patch_size": 14},
    "openai/clip-vit-large-patch14-336": _CLIP | _LARGE | {"patch_size": 14, "image_size": 336},
    "facebook/dinov2-small": _DINOV2 | _SMALL,
    "facebook/dinov2-base": _DINOV2,
    "facebook/dinov2-large": _DINOV2 | _LARGE,
    "facebook/dinov2-giant": _DINOV2
    | {
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "use_swiglu_ffn": True,
    },
    "google/siglip-base-patch16-224": _SIGLIP,
    "google/siglip-base-patch16-256": _SIGLIP | {"image_size": 256},
    "google/siglip-large-patch16-256": _SIGLIP | _LARGE | {"image_size": 256},
    "google/siglip-so400m-patch14-384": _SIGLIP
    | {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "image_size": 384,
        "patch_size": 14,
    },
}
_DEFAULTS = {
    "vit": ARCHITECTURES["google/vit-base-patch16-224"],
    "clip_vision_model": ARCHITECTURES["openai/clip-vit-base-patch32"],
    "dinov2": _DINOV2 | {"image_size": 224},
    "siglip_vision_model": ARCHITECTURES["google/siglip-base-patch16-224"],
}


class ViT(nnx.Module):
    """Images to one pooled vector.

    The class token and its position are one parameter, as only their sum is ever used.

    Args:
      config: the content of a config.json (of CLIP's and SigLIP's also the whole model's); fields
        that it lacks take the defaults of `transformers`.
      mean: of the pixels in [0, 1] that the weights were trained with, for red, green and blue.
      std: their standard deviation.
      pooling: "cls" (the normalised class token), "pooler" (a dense layer and tanh over it),
        "attention" (SigLIP's attention pooling), "mean" (over the normalised patches), or empty:
        SigLIP's "attention", others' "cls".
      dtype: of the operands of matrix products; everything else is float32.
      remat: see `transformer.Layers`.
      rngs: keys for the initial parameters.

    Attributes:
      dim: width of the output.
      image_size: pixels a side that the position table was trained at; at others, and for
        rectangles, it is interpolated.

    Raises:
      ValueError: the pooling does not fit, or something in the config is unknown.
    """

    def __init__(
        self,
        config: Mapping,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        pooling: str = "",
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        config = vision_config(config)
        siglip = config["model_type"] == "siglip_vision_model"
        self.pooling = pooling or default_pooling(config)
        check_pooling(config, pooling)
        depth, shape = vision_shape(config)
        self.dim, self.image_size, self.patch = (
            shape.hidden,
            config["image_size"],
            config["patch_size"],
        )
        self.mean, self.std = tuple(mean), tuple(std)
        normal = nnx.initializers.normal(0.02)
        clip = config["model_type"] == "clip_vision_model"
        self.patches = Linear(
            3 * self.patch**2, self.dim, use_bias=not clip, dtype=dtype, rngs=rngs
        )
        side = self.image_size // self.patch
        self.position = nnx.Param(normal(rngs.params(), (side**2, self.dim)))
        self.class_token = None if siglip else nnx.Param(normal(rngs.params(), (self.dim,)))
        self.input_norm = LayerNorm(self.dim, epsilon=shape.epsilon) if clip else None
        self.layers = Layers(depth, shape, dtype=dtype, remat=remat, rngs=rngs)
        self.norm = LayerNorm(self.dim, epsilon=shape.epsilon)
        dense = functools.partial(Linear, use_bias=True, dtype=dtype, rngs=rngs)
        self.pooler = dense(self.dim, self.dim) if self.pooling == "pooler" else None
        self.attention_pool = (
            AttentionPool(shape, dtype=dtype, rngs=rngs) if self.pooling == "attention" else None
        )

    def __call__(
        self,
        images: UInt8[Array | np.ndarray, "batch height width 3"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch dim"]:
        """Pooled features of RGB images with values 0 to 255; they are normalised here.

        Pixels on the right and at the bottom that fill no whole patch are cut off.
        """
        pixels = jnp.asarray(images).astype(jnp.float32) / 255
        pixels = (pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        return self._features(pixels, None if rngs is None else rngs.dropout())

    def _features(self, pixels: Float[Array, "batch height width 3"], key=None):
        batch, height, width, _ = pixels.shape
        rows, columns = height // self.patch, width // self.patch
        pixels = pixels[:, : rows * self.patch, : columns * self.patch]
        split = pixels.reshape(batch, rows, self.patch, columns, self.patch, 3)
        flat = split.transpose(0, 1, 3, 2, 4, 5).reshape(batch * rows * columns, -1)
        x = self.patches(flat).reshape(batch, rows * columns, self.dim)
        x = x + self._positions(rows, columns)
        if self.class_token is not None:
            token = jnp.broadcast_to(self.class_token[...], (batch, 1, self.dim))
            x = jnp.concatenate([token, x], axis=1)
        x = x if self.input_norm is None else self.input_norm(x)
        x = self.layers(x, key=key)
        return self._pool(x)

    def _pool(self, x: Float[Array, "batch length dim"]) -> Float[Array, "batch dim"]:
        if self.attention_pool is not None:
            return self.attention_pool(self.norm(x))
        if self.pooling == "mean":
            return jnp.mean(self.norm(x)[:, 0 if self.class_token is None else 1 :], axis=1)
        x = self.norm(x[:, 0])
        return x if self.pooler is None else jnp.tanh(self.pooler(x))

    def _positions(self, rows: int, columns: int) -> Float[Array, "patches dim"]:
        """The position table, interpolated to a grid of patches."""
        table, side = self.position[...], self.image_size // self.patch
        if (rows, columns) == (side, side):
            return table
        grid = table.reshape(side, side, self.dim)
        down, across = bicubic_weights(side, rows), bicubic_weights(side, columns)
        return jnp.einsum("ri,cj,ijd->rcd", down, across, grid).reshape(-1, self.dim)


class AttentionPool(nnx.Module):
    """SigLIP's pooling: one learned query attends to all tokens, then a feed-forward block."""

    def __init__(self, shape: Shape, *, dtype: DTypeLike, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        dense = functools.partial(Linear, use_bias=True, dtype=dtype, rngs=rngs)
        self.probe = nnx.Param(normal(rngs.params(), (shape.hidden,)))
        self.query = dense(shape.hidden, shape.hidden)
        self.key_value = dense(shape.hidden, 2 * shape.hidden)
        self.output = dense(shape.hidden, shape.hidden)
        self.norm = LayerNorm(shape.hidden, epsilon=shape.epsilon)
        self.mlp = FeedForward(shape, dtype=dtype, rngs=rngs)
        self.heads, self.dtype = shape.heads, dtype

    def __call__(self, x: Float[Array, "batch length dim"]) -> Float[Array, "batch dim"]:
        """Pools each row's tokens."""
        batch, length, dim = x.shape
        query = self.query(self.probe[...][None]).reshape(1, 1, self.heads, -1)
        key_value = self.key_value(x.reshape(-1, dim)).reshape(batch, length, 2, self.heads, -1)
        query = jnp.broadcast_to(query, (batch, *query.shape[1:]))
        pooled = attend(query, key_value[:, :, 0], key_value[:, :, 1], None, self.dtype)
        pooled = self.output(pooled.reshape(batch, dim))
        return pooled + self.mlp(self.norm(pooled))


def bicubic_weights(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The matrix that resizes a row of `old` samples to `new` ones, as PyTorch does it.

    Keys' cubic convolution with a = -0.75, sample centres aligned, edges repeated, and no
    antialiasing. (`jax.image.resize` uses a = -0.5 and antialiases.)
    """
    a = -0.75
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place).astype(int) - 1
    weights = np.zeros((new, old))
    for tap in range(4):
        distance = np.abs(place - (first + tap))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        np.add.at(
            weights,
            (np.arange(new), np.clip(first + tap, 0, old - 1)),
            np.where(distance <= 1, near, far),
        )
    return weights.astype(np.float32)


def vision_config(config: Mapping) -> dict:
    """The image tower's part of a config.json, with the defaults filled in.

    Raises:
      ValueError: it is not of one of the four kinds, or needs what is not here.
    """
    model_type = config.get("model_type")
    if model_type in ("clip", "siglip"):
        config = config.get("vision_config") or {}
        model_type = f"{model_type}_vision_model"
    if model_type not in _DEFAULTS:
        raise ValueError(f"model_type {model_type!r} is not one of {', '.join(_DEFAULTS)}")
    if not isinstance(config, Mapping):
        raise ValueError(f"vision_config is {config!r}; it must hold the image tower's fields")
    config = _DEFAULTS[model_type] | dict(config) | {"model_type": model_type}
    for side in ("image_size", "patch_size"):
        if isinstance(config[side], (list, tuple)):
            if len(config[side]) not in (1, 2) or config[side][0] != config[side][-1]:
                raise ValueError(f"{side} {config[side]} is not square")
            config[side] = config[side][0]
        read_field(config, side, WIDTH)
    if config["patch_size"] > config["image_size"]:
        raise ValueError(
            f"patch_size {config['patch_size']} is above image_size {config['image_size']}"
        )
    if config.get("num_channels", 3) != 3:
        raise ValueError(f"images of {config['num_channels']} channels are not supported, only 3")
    if config.get("pooler_act", "tanh") != "tanh":
        raise ValueError(f"pooler_act {config['pooler_act']!r} is not supported, only tanh")
    if (config.get("pooler_output_size") or config["hidden_size"]) != config["hidden_size"]:
        raise ValueError("a pooler that changes the width (pooler_output_size) is not supported")
    return config


def check_pooling(config: Mapping, pooling: str) -> None:
    """Raises ValueError where an image tower can't be pooled so; empty is its own pooling."""
    config = vision_config(config)
    fitting = {"siglip_vision_model": ("attention", "mean"), "vit": ("cls", "pooler", "mean")}
    known = fitting.get(config["model_type"], ("cls", "mean"))
    pooled = pooling or default_pooling(config)
    if pooled not in known:
        raise ValueError(
            f"pooling is {pooling!r}; of {config['model_type']} it can be {', '.join(known)}"
        )
    if pooled == "attention" and config.get("vision_use_head") is False:
        raise ValueError(
            f"pooling is {pooling!r}, and this SigLIP tower has no attention pooling head: set it "
            "to mean"
        )


def default_pooling(config: Mapping) -> str:
    """The pooling that a completed vision config's kind was trained with."""
    return "attention" if config["model_type"] == "siglip_vision_model" else "cls"


def vision_shape(config: Mapping) -> tuple[int, Shape]:
    """Depth and layer shape that a completed vision config describes."""
    read = functools.partial(read_field, config)
    hidden, gated = read("hidden_size", WIDTH), read("use_swiglu_ffn", Flag(), False)
    if config["model_type"] == "dinov2":
        inner = int(hidden * read("mlp_ratio", Real(1, 1000)))
        if gated:
            # Two thirds, rounded up to a multiple of 8, keep the count of parameters.
            inner = (int(inner * 2 / 3) + 7) // 8 * 8
    else:
        inner = read("intermediate_size", WIDTH)
    return read("num_hidden_layers", Whole(1)), Shape(
        hidden=hidden,
        heads=read("num_attention_heads", Divisor(hidden)),
        inner=inner,
        activation="silu" if gated else read("hidden_act", Choice(*ACTIVATIONS)),
        epsilon=read("layer_norm_eps", EPSILON),
        pre_norm=True,
        dropout=read("hidden_dropout_prob", RATE, 0.0),
        attention_dropout=read(
            "attention_probs_dropout_prob", RATE, read("attention_dropout", RATE, 0.0)
        ),
        qkv_bias=read("qkv_bias", Flag(), True),
        layer_scale=config["model_type"] == "dinov2",
        gated=gated,
    )


_VIT_ATTENTION = {
    "attention.qkv": tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    "attention.output": ("attention.output.dense",),
}
_VIT_LAYER = _VIT_ATTENTION | {
    "attention_norm": ("layernorm_before",),
    "mlp.inner": ("intermediate.dense",),
    "mlp.outer": ("output.dense",),
    "mlp_norm": ("layernorm_after",),
}
_DINOV2_LAYER = _VIT_ATTENTION | {
    "attention_norm": ("norm1",),
    "mlp.inner": ("mlp.fc1",),
    "mlp.outer": ("mlp.fc2",),
    "mlp_norm": ("norm2",),
}
_DINOV2_GATED_LAYER = _DINOV2_LAYER | {
    "mlp.inner": ("mlp.weights_in",),
    "mlp.outer": ("mlp.weights_out",),
}
_CLIP_LAYER = {
    "attention.qkv": tuple(f"self_attn.{name}_proj" for name in "qkv"),
    "attention.output": ("self_attn.out_proj",),
    "attention_norm": ("layer_norm1",),
    "mlp.inner": ("mlp.fc1",),
    "mlp.outer": ("mlp.fc2",),
    "mlp_norm": ("layer_norm2",),
}
# Our modules -> the checkpoints', outside of the layers.
_MODULES = {
    "patches": ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
    "input_norm": ("pre_layrnorm",),  # sic
    "norm": ("layernorm", "post_layernorm"),
    "pooler": ("pooler.dense",),
    "attention_pool.output": ("head.attention.out_proj",),
    "attention_pool.norm": ("head.layernorm",),
    "attention_pool.mlp.inner": ("head.mlp.fc1",),
    "attention_pool.mlp.outer": ("head.mlp.fc2",),
}
_PREFIXES = ("vit.", "dinov2.", "vision_model.")
# What belongs to other tasks, to the text side, or to pre-training.
_IGNORED = (
    "classifier.",
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_",
    "embeddings.mask_token",
    "embeddings.position_ids",
)


def rename(
    weights: Mapping[str, np.ndarray], config: Mapping, pooling: str = ""
) -> dict[str, np.ndarray]:
    """A published checkpoint's tensors under the names of `ViT`.

    Heads of other tasks and text towers are left out, and so are poolers that are not used.
    Whatever else is not known keeps its name, for the merge to complain about.
    """
    config = vision_config(config)
    depth, _ = vision_shape(config)
    left = {}
    for name, value in weights.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if not name.startswith(_IGNORED):
            left[name] = value
    renamed = rename_layers(left, depth, *_layer_table(config), "layers.stacked.")
    for ours, index in (("attention_scale", 1), ("mlp_scale", 2)):
        names = [f"encoder.layer.{layer}.layer_scale{index}.lambda1" for layer in range(depth)]
        if all(name in left for name in names):
            renamed[f"layers.stacked.{ours}"] = np.stack([left.pop(name) for name in names])
    renamed |= _rename_embeddings(left) | _rename_attention_pool(left)
    for ours, sources in _MODULES.items():
        for theirs in sources:
            for suffix in ("weight", "bias"):
                value = left.pop(f"{theirs}.{suffix}", None)
                if value is not None:
                    renamed |= _module_entry(ours, suffix, value)
    pooling = pooling or default_pooling(config)
    modules = {"pooler": "pooler.", "attention": "attention_pool."}
    unused = tuple(prefix for used_by, prefix in modules.items() if used_by != pooling)
    return {name: array for name, array in renamed.items() if not name.startswith(unused)} | left


def restore(weights: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """The inverse of `rename`: a tower's weights under the names of `transformers`.

    The class token keeps the position that was added to it, whose row in the table is zero.

    Args:
      weights: of a `ViT`, by name.
      config: content of the config.json that goes with them.
    """
    config = vision_config(config)
    kind, depth = config["model_type"], vision_shape(config)[0]
    left, flat = dict(weights), kind in ("clip_vision_model", "siglip_vision_model")
    restored = restore_layers(left, depth, *_layer_table(config), "layers.stacked.")
    for ours, index in (("attention_scale", 1), ("mlp_scale", 2)):
        stacked = left.pop(f"layers.stacked.{ours}", ())
        for layer, scale in enumerate(stacked):
            restored[f"encoder.layer.{layer}.layer_scale{index}.lambda1"] = scale
    restored |= _restore_embeddings(left, flat) | _restore_attention_pool(left)
    for ours, names in _MODULES.items():
        theirs = names[-1] if flat else names[0]
        for ending in ("kernel", "scale", "bias"):
            value = left.pop(f"{ours}.{ending}", None)
            if value is None:
                continue
            if ending == "kernel":
                value = value.T
            if ours == "patches" and ending == "kernel":
                side = config["patch_size"]
                value = value.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)
            restored[f"{theirs}.{'bias' if ending == 'bias' else 'weight'}"] = value
    if kind == "dinov2":  # of pre-training
        restored["embeddings.mask_token"] = np.zeros((1, config["hidden_size"]), np.float32)
    return restored | left


def _layer_table(config: Mapping) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The prefix of a layer's tensors in a checkpoint, and their names by ours."""
    gated = bool(config.get("use_swiglu_ffn"))
    tables = {
        "vit": ("encoder.layer.{}.", _VIT_LAYER),
        "dinov2": ("encoder.layer.{}.", _DINOV2_GATED_LAYER if gated else _DINOV2_LAYER),
    }
    return tables.get(config["model_type"], ("encoder.layers.{}.", _CLIP_LAYER))


def _restore_embeddings(left: dict[str, np.ndarray], flat: bool) -> dict[str, np.ndarray]:
    """Position table and class token, in CLIP's and SigLIP's form (`flat`) or the others'."""
    position, token = left.pop("position"), left.pop("class_token", None)
    if token is not None:
        position = np.concatenate([np.zeros_like(token)[None], position])
    if flat:
        classes = {} if token is None else {"embeddings.class_embedding": token}
        return {"embeddings.position_embedding.weight": position} | classes
    return {
        "embeddings.position_embeddings": position[None],
        "embeddings.cls_token": token[None, None],
    }


def _module_entry(module: str, suffix: str, value: np.ndarray) -> dict[str, np.ndarray]:
    """One tensor of a dense layer, a norm, or the convolution over patches."""
    if suffix == "bias":
        return {f"{module}.bias": value}
    if value.ndim == 4:
        # [dim, 3, row, column] -> [row * column * 3, dim], the order of a flattened patch.
        return {f"{module}.kernel": value.transpose(2, 3, 1, 0).reshape(-1, len(value))}
    return {f"{module}.scale": value} if value.ndim == 1 else {f"{module}.kernel": value.T}


def _rename_embeddings(left: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Position table and class token; the token's position is added to it."""

    def take(*names: str) -> np.ndarray | None:
        return next((left.pop(name) for name in names if name in left), None)

    position = take("embeddings.position_embeddings", "embeddings.position_embedding.weight")
    token = take("embeddings.cls_token", "embeddings.class_embedding")
    if position is None:
        return {}
    position = position.reshape(-1, position.shape[-1])
    if token is None:
        return {"position": position}
    return {"position": position[1:], "class_token": token.reshape(-1) + position[0]}


def _rename_attention_pool(left: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """SigLIP's query and joint projection; the rest of its pooling is in `_MODULES`."""
    names = ("head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias")
    if not all(name in left for name in names):
        return {}
    probe, weight, bias = (left.pop(name) for name in names)
    dim = weight.shape[1]
    return {
        "attention_pool.probe": probe.reshape(-1),
        "attention_pool.query.kernel": weight[:dim].T,
        "attention_pool.query.bias": bias[:dim],
        "attention_pool.key_value.kernel": weight[dim:].T,
        "attention_pool.key_value.bias": bias[dim:],
    }


def _restore_attention_pool(left: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """SigLIP's query and joint projection."""
    if "attention_pool.probe" not in left:
        return {}

    def joined(part: str) -> np.ndarray:
        names = ("query", "key_value")
        return np.concatenate([left.pop(f"attention_pool.{name}.{part}") for name in names], -1)

    return {
        "head.probe": left.pop("attention_pool.probe")[None, None],
        "head.attention.in_proj_weight": joined("kernel").T,
        "head.attention.in_proj_bias": joined("bias"),
    }
