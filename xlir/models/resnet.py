"""ResNet, the image tower of the Hugging Face checkpoints `microsoft/resnet-*`.

Architecture: He et al. 2015 (https://arxiv.org/abs/1512.03385), variant v1.5: the 3x3 convolution
of a bottleneck halves the resolution, not the 1x1 convolution before it. The fields of config.json
mean the same as in transformers' `ResNetModel`, and the output is that model's pooled output.

Batch normalisation is folded into the convolutions, for inference and for fine-tuning.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from xlir.config import WIDEST, Flag, Whole, Widths, read_field
from xlir.models.family import Family, TowerSpec, Weights

# Defaults for fields that a config.json omits, from transformers' ResNetConfig.
DEFAULTS = {
    "num_channels": 3,
    "embedding_size": 64,
    "hidden_sizes": (256, 512, 1024, 2048),
    "depths": (3, 4, 6, 3),
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
BASIC = {"layer_type": "basic", "hidden_sizes": (64, 128, 256, 512)}
# Hub id -> the fields of its config.json that differ from the defaults.
ARCHITECTURES: dict[str, dict] = {
    "microsoft/resnet-18": {**BASIC, "depths": (2, 2, 2, 2)},
    "microsoft/resnet-26": {"depths": (2, 2, 2, 2)},
    "microsoft/resnet-34": dict(BASIC),
    "microsoft/resnet-50": {},
    "microsoft/resnet-101": {"depths": (3, 4, 23, 3)},
    "microsoft/resnet-152": {"depths": (3, 8, 36, 3)},
}
LAYER_TYPES = ("basic", "bottleneck")
# The inner width of a bottleneck is its output width divided by this.
REDUCTION = 4
BATCH_NORM_EPSILON = 1e-5
IMAGE_SIZE = 224


class Shape(NamedTuple):
    """The shape of one convolution; its padding is half the kernel size."""

    features: int
    output: int
    kernel_size: int
    stride: int


class BlockShape(NamedTuple):
    """The convolutions of a block, and its projection shortcut if the shape changes."""

    convolutions: list[Shape]
    shortcut: Shape | None


class ResNet(nnx.Module):
    """Maps images to globally average-pooled features of the last block; no classifier.

    Args:
      config: content of a config.json of model type "resnet"; missing fields take the defaults.
      mean, std: red, green and blue mean and deviation that pixels in [0, 1] are normalised with.
      dtype: compute dtype; the parameters and the features are float32.
      remat: recompute the inner activations of each block in the backward pass.

    Attributes:
      dim: width of the features.
      image_size: image size, in pixels per side, of the published weights; other sizes work too.

    Raises:
      ValueError: the config is for another model, or needs an unsupported feature.
    """

    def __init__(
        self,
        config: Mapping,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        stem, blocks = shapes(config)
        self.dim = blocks[-1].convolutions[-1].output
        self.image_size = IMAGE_SIZE
        self.mean, self.std = tuple(mean), tuple(std)
        self.dtype = dtype
        self.remat = remat
        self.stem = Convolution(stem, rngs=rngs)
        self.blocks = nnx.List([Block(shape, rngs=rngs) for shape in blocks])

    def __call__(
        self,
        images: Num[Array | np.ndarray, "batch height width 3"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch dim"]:
        """Features of RGB images with values 0 to 255, which this method normalises. No dropout."""
        pixels = jnp.asarray(images).astype(jnp.float32) / 255
        mean, std = jnp.float32(self.mean), jnp.float32(self.std)
        return self._features((pixels - mean) / std)

    def _features(self, pixels: Float[Array, "batch height width 3"]) -> Float[Array, "batch dim"]:
        x = _max_pool(jax.nn.relu(self.stem(pixels.astype(self.dtype))))
        for block in self.blocks:
            x = _rematerialised(block, x) if self.remat else block(x)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


class Block(nnx.Module):
    """Convolutions with ReLU between them, and a skip that is projected if the shape changes."""

    def __init__(self, shape: BlockShape, *, rngs: nnx.Rngs):
        self.convolutions = nnx.List([Convolution(s, rngs=rngs) for s in shape.convolutions])
        self.shortcut = None if shape.shortcut is None else Convolution(shape.shortcut, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Height and width are divided by the stride, rounded up."""
        y = x
        for convolution in self.convolutions[:-1]:
            y = jax.nn.relu(convolution(y))
        y = self.convolutions[-1](y)
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Convolution(nnx.Module):
    """A convolution with bias. A 1x1 kernel is applied as one matrix product over all pixels."""

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        self.kernel_size, self.stride = shape.kernel_size, shape.stride
        kernel = (shape.features, shape.output)
        if shape.kernel_size > 1:
            kernel = (shape.kernel_size, shape.kernel_size, *kernel)
        # He et al. 2015 with fan-out, as in transformers.
        scale = math.sqrt(2 / (shape.output * shape.kernel_size**2))
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), kernel) * scale)
        self.bias = nnx.Param(jnp.zeros(shape.output))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Applies the convolution. Height and width are divided by the stride, rounded up."""
        kernel, bias = self.kernel.astype(x.dtype), self.bias.astype(x.dtype)
        if self.kernel_size == 1:
            x = x[:, :: self.stride, :: self.stride]
            y = x.reshape(-1, x.shape[-1]) @ kernel
            return y.reshape(*x.shape[:-1], -1) + bias
        padding = (self.kernel_size // 2,) * 2
        return bias + jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=(padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def rename(weights: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """Converts a checkpoint to our names (`pretrained.flatten`), with batch normalisation folded.

    Unknown tensors keep their names, so that `pretrained.merge` reports them.

    Args:
      weights: state dict of transformers' ResNetModel or ResNetForImageClassification. The
        classifier and the batch counter, which only training uses, are dropped.
      config: content of the checkpoint's config.json.

    Raises:
      ValueError: the config is for another model, or needs an unsupported feature.
    """
    rest = {
        name.removeprefix("resnet."): tensor
        for name, tensor in weights.items()
        if not name.startswith("classifier.") and not name.endswith(".num_batches_tracked")
    }
    renamed = {}
    for ours, theirs in convolution_names(config):
        names = [f"{theirs}.convolution.weight"] + [
            f"{theirs}.normalization.{part}"
            for part in ("weight", "bias", "running_mean", "running_var")
        ]
        if all(name in rest for name in names):
            kernel, bias = _folded(*(rest.pop(name) for name in names))
            renamed[f"{ours}.kernel"], renamed[f"{ours}.bias"] = kernel, bias
    return renamed | rest


def restore(weights: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """The inverse of `rename`: weights under the names of transformers' ResNetModel.

    Batch normalisation stays folded: the written normalisation only adds the bias.
    """
    left, restored = dict(weights), {}
    for ours, theirs in convolution_names(config):
        kernel, bias = left.pop(f"{ours}.kernel"), left.pop(f"{ours}.bias")
        kernel = kernel if kernel.ndim == 4 else kernel[None, None]
        restored |= {
            f"{theirs}.convolution.weight": kernel.transpose(3, 2, 0, 1),
            f"{theirs}.normalization.weight": np.ones_like(bias),
            f"{theirs}.normalization.bias": bias,
            f"{theirs}.normalization.running_mean": np.zeros_like(bias),
            f"{theirs}.normalization.running_var": np.full_like(bias, 1 - BATCH_NORM_EPSILON),
            f"{theirs}.normalization.num_batches_tracked": np.int64(0),
        }
    return restored | left


def convolution_names(config: Mapping) -> Iterator[tuple[str, str]]:
    """Each convolution's name here and in the checkpoint, which counts blocks by stage."""
    yield "stem", "embedder.embedder"
    index = 0
    for stage, blocks in enumerate(_stages(config)):
        for layer, block in enumerate(blocks):
            ours, theirs = f"blocks.{index}", f"encoder.stages.{stage}.layers.{layer}"
            for number in range(len(block.convolutions)):
                yield f"{ours}.convolutions.{number}", f"{theirs}.layer.{number}"
            if block.shortcut is not None:
                yield f"{ours}.shortcut", f"{theirs}.shortcut"
            index += 1


def shapes(config: Mapping) -> tuple[Shape, list[BlockShape]]:
    """The stem and the blocks that a config.json describes.

    Raises:
      ValueError: the config is for another model, or needs an unsupported feature.
    """
    stem = Shape(3, _checked(config)["embedding_size"], 7, 2)
    return stem, [block for stage in _stages(config) for block in stage]


def _stages(config: Mapping) -> list[list[BlockShape]]:
    """The blocks of each stage."""
    config = _checked(config)
    features, stages = config["embedding_size"], []
    for stage, (output, depth) in enumerate(
        zip(config["hidden_sizes"], config["depths"], strict=True)
    ):
        blocks = []
        for layer in range(depth):
            halves = layer == 0 and (stage > 0 or config["downsample_in_first_stage"])
            convolutions = _block(config, features, output, 2 if halves else 1)
            blocks.append(BlockShape(convolutions, _shortcut(convolutions)))
            features = output
        stages.append(blocks)
    return stages


def _block(config: Mapping, features: int, output: int, stride: int) -> list[Shape]:
    if config["layer_type"] == "basic":
        return [Shape(features, output, 3, stride), Shape(output, output, 3, 1)]
    hidden = output // REDUCTION
    first, second = (stride, 1) if config["downsample_in_bottleneck"] else (1, stride)
    return [
        Shape(features, hidden, 1, first),
        Shape(hidden, hidden, 3, second),
        Shape(hidden, output, 1, 1),
    ]


def _shortcut(shapes: Sequence[Shape]) -> Shape | None:
    """The projection shortcut of a block, or None if the block keeps the input's shape."""
    stride = math.prod(shape.stride for shape in shapes)
    if stride == 1 and shapes[0].features == shapes[-1].output:
        return None
    return Shape(shapes[0].features, shapes[-1].output, 1, stride)


def _checked(config: Mapping) -> dict:
    """The config with its defaults filled in."""
    config = {"model_type": "resnet", **DEFAULTS, **config}
    for field, known in (
        ("model_type", ("resnet",)),
        ("layer_type", LAYER_TYPES),
        ("hidden_act", ("relu",)),
        ("num_channels", (3,)),
    ):
        if config[field] not in known:
            names = ", ".join(map(str, known))
            raise ValueError(f"{field} in ResNet's config is {config[field]!r}; known: {names}")
    for field in ("downsample_in_first_stage", "downsample_in_bottleneck"):
        read_field(config, field, Flag())
    read_field(config, "embedding_size", Whole(1, WIDEST))
    least = REDUCTION if config["layer_type"] == "bottleneck" else 1
    widths = read_field(config, "hidden_sizes", Widths(least))
    depths = read_field(config, "depths", Widths())
    if not depths or len(widths) != len(depths):
        raise ValueError(
            f"ResNet's config has hidden_sizes {widths} and depths {depths}; "
            "it needs one width and one depth for each stage"
        )
    return config


def _folded(
    kernel: np.ndarray, gain: np.ndarray, bias: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Folds the batch normalisation into a convolution [out, in, h, w] without bias.

    Returns:
      The kernel in our layout (1x1 [in, out], else [h, w, in, out]) and the bias.
    """
    scale = gain.astype(np.float64) / np.sqrt(variance.astype(np.float64) + BATCH_NORM_EPSILON)
    kernel = np.transpose(kernel, (2, 3, 1, 0)) * scale
    if kernel.shape[:2] == (1, 1):
        kernel = kernel[0, 0]
    return kernel.astype(np.float32), (bias - mean * scale).astype(np.float32)


def _rematerialised(block: Block, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
    """Applies a block; the backward pass recomputes its inner activations."""
    # nnx.remat rejects a block that was created outside of the trace, even if it is not changed.
    graph, state = nnx.split(block)
    return jax.checkpoint(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def _max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """3x3 max pooling with stride 2."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class ResNetFamily(Family):
    """See `Family`."""

    def check(self, config: Mapping) -> None:
        """See `Family.check`."""
        shapes(config)

    def create(self, spec: TowerSpec, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs) -> ResNet:
        """See `Family.create`."""
        colours = {"mean": spec.preprocessing.mean, "std": spec.preprocessing.std}
        return ResNet(spec.config, **colours, dtype=dtype, remat=remat, rngs=rngs)

    def rename(self, weights: Weights, config: Mapping, pooling: str) -> dict[str, np.ndarray]:
        """See `Family.rename`."""
        return rename(weights, config)

    def restore(self, weights: Weights, config: Mapping) -> dict[str, np.ndarray]:
        """See `Family.restore`."""
        return restore(weights, config)

    def image_size(self, config: Mapping) -> int:
        """See `Family.image_size`."""
        return IMAGE_SIZE

    def torch_arguments(self, spec: TowerSpec) -> dict[str, Any]:
        """See `Family.torch_arguments`."""
        stem, blocks = shapes(spec.config)
        return {
            "stem": stem,
            "blocks": [block._asdict() for block in blocks],
            "mean": spec.preprocessing.mean,
            "std": spec.preprocessing.std,
        }


RESNET = ResNetFamily(
    name="resnet",
    side="image",
    kind="resnet",
    below_layers=frozenset(("stem",)),
    outputs={"mean": ("pooler_output", "mean")},
    architectures=ARCHITECTURES,
)
