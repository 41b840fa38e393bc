"""Converts published PyTorch dual encoders to a run's folder, so that they can be evaluated.

Two layouts are supported. M-CLIP (Carlsson et al. 2022) has a multilingual text encoder in one
folder and a CLIP model for images in another. open_clip's models (Ilharco et al. 2021) have both
sides in one folder; their text encoder must be one from Hugging Face.
"""

import contextlib
import dataclasses
import logging
import math
import pathlib
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from configs import base
from input_pipeline.preprocessing import CLIP, Preprocessing
from input_pipeline.tokenizers import HuggingFaceTokenizer
from xlir import partition
from xlir.config import LARGEST_IMAGE, Group, Real, Text, Whole, check_config, read_field
from xlir.embed import SIDES
from xlir.encoder import Encoder
from xlir.models import clip, dual_encoder, pretrained, registry, towers
from xlir.models.family import TowerSpec
from xlir.models.transformer import WIDTH

log = logging.getLogger(__name__)

# Supported values of `model_type` in the config.json of a folder that is not from open_clip.
HUGGING_FACE_LAYOUTS = {"text": ("M-CLIP",), "image": (*clip.CLIP.other_names, clip.CLIP.name)}
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# The maximum number of tokens if open_clip's config does not set it.
OPEN_CLIP_LENGTH = 77
# Supported fields of an open_clip model's vision_cfg: fields that are used here, fields that only
# training uses, and fields with the one value that is supported. Anything else is an error.
VISION_FIELDS = ("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio")
TRAINING_FIELDS = ("patch_dropout", "output_tokens")
VISION_VALUES = {"pool_type": "tok", "pos_embed_type": "learnable", "block_type": "default"}

Weights = dict[str, np.ndarray]


class Published(NamedTuple):
    """A published folder's content.

    `layout` is "open_clip" or the `model_type` in its config.json.
    """

    folder: pathlib.Path
    layout: str
    config: dict[str, Any]
    weights: Weights


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a model. The weights have this package's names.

    Attributes:
      options: fields of config.text or config.image.
      spec: the tower's spec.
      tower, head: the weights of the tower and of the head.
      dim: the number of dimensions of the embeddings.
    """

    options: dict[str, Any]
    spec: TowerSpec
    tower: Weights
    head: Weights
    dim: int


def import_model(text: str, image: str, workdir: pathlib.Path) -> None:
    """Converts a published model to a run's folder with a checkpoint of step 0.

    Args:
      text: the folder of the text encoder, from M-CLIP or open_clip.
      image: the folder of the image encoder, CLIP in Hugging Face's layout or open_clip. It may be
        the same folder as `text`.
      workdir: the folder to create. It appears only when it is complete.

    Raises:
      FileNotFoundError: a folder or one of its files is missing.
      FileExistsError: the workdir exists and is not an empty folder.
      ValueError: the layout is unknown, a file is damaged, or the two sides do not match.
    """
    if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
        raise FileExistsError(f"{workdir} already exists: choose a new folder with --workdir")
    of_text = _read("text", text)
    of_image = of_text if image == text else _read("image", image)
    _check_layout("text", of_text)
    _check_layout("image", of_image)
    with _errors_name(of_text):
        text_side, tokenizer = _text_side(of_text)
    with _errors_name(of_image):
        image_side = _image_side(of_image)
    if text_side.dim != image_side.dim:
        raise ValueError(
            f"{of_text.folder} embeds texts in {text_side.dim} dimensions and {of_image.folder} "
            f"images in {image_side.dim}: they are not from the same model"
        )
    config = base.get_config()
    config.embedding_dim = text_side.dim
    config.text.update(text_side.options, tower=text)
    config.image.update(image_side.options, tower=image)
    _set_scale(config, of_image.weights | of_text.weights)
    with _errors_name(of_image):
        check_config(config)
    model = _model(config, {"text": text_side, "image": image_side}, (of_text, of_image))
    specs = {"text": text_side.spec, "image": image_side.spec}
    Encoder.from_model(config, model, tokenizer, specs).save_run(workdir)
    log.info("%s: texts of %s, images of %s, %d dimensions", workdir, text, image, text_side.dim)


def _read(flag: str, name: str) -> Published:
    folder = pathlib.Path(name).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--{flag}: there is no folder {folder}; download it: hf download ID --local-dir FOLDER"
        )
    if (folder / OPEN_CLIP_CONFIG).is_file():
        config, files = pretrained.read_json(folder / OPEN_CLIP_CONFIG), OPEN_CLIP_WEIGHTS
        layout = "open_clip"
    else:
        config, files = pretrained.read_config(folder), pretrained.WEIGHT_FILES
        layout = str(config.get("model_type"))
    try:
        weights = pretrained.in_float32(pretrained.read_checkpoint(folder, files))
        return Published(folder, layout, config, weights)
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from error


def _check_layout(flag: str, published: Published) -> None:
    if published.layout not in ("open_clip", *HUGGING_FACE_LAYOUTS[flag]):
        raise ValueError(
            f"--{flag}: {published.folder} has no {OPEN_CLIP_CONFIG}, and the model_type in its "
            f"config.json is {published.layout!r}; known: {', '.join(HUGGING_FACE_LAYOUTS[flag])}"
        )


@contextlib.contextmanager
def _errors_name(published: Published) -> Iterator[None]:
    """Adds the folder to the messages of errors."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{published.folder}: its configuration lacks {error}") from error
    except (ValueError, FileNotFoundError) as error:
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        prefix = "" if str(published.folder) in str(error) else f"{published.folder}: "
        raise kind(f"{prefix}{error}") from error


def _text_side(published: Published) -> tuple[Side, HuggingFaceTokenizer]:
    is_open_clip = published.layout == "open_clip"
    side = _open_clip_text(published) if is_open_clip else _m_clip_text(published)
    fields = side.spec.family.tokenizer_fields(side.spec.config)
    tokenizer = HuggingFaceTokenizer.from_checkpoint(published.folder, fields)
    return side, tokenizer.cleaned() if is_open_clip else tokenizer


def _m_clip_text(published: Published) -> Side:
    weights = dict(published.weights)
    kernel, bias = _pop(weights, "LinearTransformation.weight", "LinearTransformation.bias")
    return _transformer(
        read_field(published.config, "modelBase", Text(may_be_empty=False)),
        {name.removeprefix("transformer."): array for name, array in weights.items()},
        {"head": "affine"},
        {"kernel": kernel.T, "bias": bias},
        len(kernel),
    )


def _open_clip_text(published: Published) -> Side:
    model = read_field(published.config, "model_cfg", Group())
    text = read_field(model, "text_cfg", Group())
    if not text.get("hf_model_name"):
        raise ValueError("its text encoder is CLIP's own; only Hugging Face's are supported")
    supported = {
        "hf_pooler_type": (None, "mean_pooler"),
        "pooler_type": (None, "mean_pooler"),  # the older name of hf_pooler_type
        "tokenizer_mode": (None, ""),
        "tokenizer_kwargs": (None, {}, {"clean": "whitespace"}),
    }
    for field, values in supported.items():
        if text.get(field) not in values:
            raise ValueError(f"text_cfg.{field} {text[field]!r} is not supported")
    weights = {
        name: array
        for name, array in published.weights.items()
        if not name.startswith(("visual.", "logit_"))
    }
    if "text.proj.0.weight" in weights:
        first, last = _pop(weights, "text.proj.0.weight", "text.proj.2.weight")
        options = {"head": "plain_mlp", "hidden": (len(first),)}
        head = {"input.kernel": first.T, "layers.0.kernel": last.T}
    elif "text.proj.weight" in weights:
        options, head = {"head": "linear"}, {"kernel": weights.pop("text.proj.weight").T}
    else:
        options, head = {"head": "none"}, {}
    return _transformer(
        read_field(text, "hf_model_name", Text()),
        {name.removeprefix("text.transformer."): array for name, array in weights.items()},
        {"max_length": read_field(text, "context_length", Whole(3), OPEN_CLIP_LENGTH), **options},
        head,
        read_field(model, "embed_dim", WIDTH),
    )


def _transformer(
    name: str, weights: Weights, options: dict[str, Any], head: Weights, dim: int
) -> Side:
    """The text side, whose tower has the architecture of the pretrained model `name`."""
    known = registry.architectures("text")
    architecture = known.get(name) or known.get(f"FacebookAI/{name}")
    if architecture is None:
        try:
            architecture = pretrained.read_config(pretrained.checkpoint_folder(name))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"import needs the config.json of {name}: {error}") from error
    family = registry.family_of("text", architecture)
    family.check(architecture)
    positions = family.longest_text(architecture)
    length = min(positions, options.get("max_length", positions))
    return Side(
        options={**options, "pooling": "mean", "max_length": length},
        spec=TowerSpec(family, architecture, "mean"),
        tower=family.rename(weights, architecture, "mean"),
        head=head,
        dim=dim,
    )


def _image_side(published: Published) -> Side:
    weights = dict(published.weights)
    if published.layout == "open_clip":
        weights, config = _hugging_face_names(weights), _vision_config(published)
        preprocessing = _preprocessing(published.config, config["image_size"])
    else:
        config = published.config
        preprocessing = Preprocessing.from_config(pretrained.read_preprocessing(published.folder))
    (projection,) = _pop(weights, "visual_projection.weight")
    return Side(
        options={"head": "linear"},
        spec=TowerSpec(clip.CLIP, config, preprocessing=preprocessing),
        tower=clip.CLIP.rename(weights, config, clip.CLIP.default_pooling),
        head={"kernel": projection.T},
        dim=len(projection),
    )


def _vision_config(published: Published) -> dict[str, Any]:
    """Translates an open_clip model's vision_cfg to the config.json of a CLIP vision model."""
    model = read_field(published.config, "model_cfg", Group())
    vision = read_field(model, "vision_cfg", Group())
    for field, value in vision.items():
        known = field in VISION_FIELDS + TRAINING_FIELDS or value == VISION_VALUES.get(field)
        if value and not known:
            raise ValueError(f"an image tower with vision_cfg.{field} {value!r} is not supported")
    if isinstance(vision.get("layers"), list):
        raise ValueError("a ResNet image tower (vision_cfg.layers is a list) is not supported")
    size, width = vision.get("image_size", 224), read_field(vision, "width", WIDTH)
    size = size[0] if isinstance(size, list) and size[:1] * 2 == size else size
    read_field({"image_size": size}, "image_size", Whole(1, LARGEST_IMAGE))
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "num_hidden_layers": read_field(vision, "layers", Whole(1)),
        "num_attention_heads": width // read_field(vision, "head_width", Whole(1, width), 64),
        "intermediate_size": int(width * read_field(vision, "mlp_ratio", Real(1, 1000), 4.0)),
        "image_size": size,
        "patch_size": read_field(vision, "patch_size", WIDTH),
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
    }


def _preprocessing(config: Mapping, size: int) -> Preprocessing:
    """The preprocessing of open_clip's evaluation; it ignores the size in preprocess_cfg."""
    given = config.get("preprocess_cfg") or {}
    if given:
        read_field(config, "preprocess_cfg", Group())
    crops = {"shortest": "center_rounded", "squash": "squash"}
    mode = given.get("resize_mode") or "shortest"
    if mode not in tuple(crops):
        raise ValueError(f"preprocess_cfg.resize_mode {mode!r} is not supported")
    return Preprocessing(
        size=size,
        resample="bilinear" if given.get("interpolation") == "bilinear" else "bicubic",
        crop=crops[mode],
        mean=given.get("mean") or CLIP["image_mean"],
        std=given.get("std") or CLIP["image_std"],
    )


_OPEN_CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.": "embeddings.patch_embedding.",
    "ln_pre.": "pre_layrnorm.",  # spelled like this in transformers
    "ln_post.": "post_layernorm.",
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}


def _hugging_face_names(weights: Weights) -> Weights:
    """Renames open_clip's image weights to the names of Hugging Face's CLIP model."""
    renamed = {}
    for name, array in weights.items():
        if not name.startswith("visual."):
            continue
        if name == "visual.proj":
            renamed["visual_projection.weight"] = array.T
            continue
        name = name.removeprefix("visual.")
        for theirs, ours in _OPEN_CLIP_NAMES.items():
            name = name.replace(theirs, ours)
        module, joint, suffix = name.partition("in_proj_")
        if joint:
            parts = dict(zip("qkv", np.split(array, 3), strict=True))
            renamed |= {f"{module}{part}_proj.{suffix}": parts[part] for part in parts}
        else:
            renamed[name] = array
    return renamed


def _set_scale(config: ConfigDict, weights: Mapping[str, np.ndarray]) -> None:
    """Sets the loss's temperature and, for models trained with the sigmoid loss, its bias."""
    if "logit_scale" in weights:
        config.loss.temperature = math.exp(-weights["logit_scale"].astype(np.float64).item())
    if "logit_bias" in weights:
        config.loss.name, config.loss.bias = "sigmoid", weights["logit_bias"].item()


def _model(
    config: ConfigDict, sides: Mapping[str, Side], published: tuple[Published, Published]
) -> dual_encoder.DualEncoder:
    """Builds the model and loads the weights of both towers and heads."""
    loaded = {}
    with partition.on_host():
        for side, folder in zip(SIDES, published, strict=True):
            spec, options = sides[side].spec, config[side]
            with _errors_name(folder):
                loaded[side] = nnx.eval_shape(
                    lambda s=spec, o=options: towers.create(s, o, rngs=nnx.Rngs(0))
                )
                _merge(loaded[side], sides[side].tower)
        rngs = nnx.Rngs(config.seed)
        model = dual_encoder.DualEncoder(config, loaded["text"], loaded["image"], rngs=rngs)
        for side, folder in zip(SIDES, published, strict=True):
            with _errors_name(folder):
                _merge(getattr(model, f"{side}_head"), sides[side].head)
    return model


def _merge(module: nnx.Module, weights: Weights) -> None:
    pretrained.merge(module, {k: np.asarray(x, np.float32) for k, x in weights.items()})


def _pop(weights: Weights, *names: str) -> list[np.ndarray]:
    """Removes the named tensors from `weights` and returns them."""
    if missing := [name for name in names if name not in weights]:
        raise ValueError(f"its weights lack {', '.join(missing)}")
    return [weights.pop(name) for name in names]
