"""Converts published PyTorch dual encoders to a run's folder, so that they can be evaluated.

Three layouts are supported. Dual encoders of `transformers` (CLIP, MetaCLIP 2, SigLIP and SigLIP 2)
have both sides in one folder. So have open_clip's models (Ilharco et al. 2021), whose text encoder
is its own or one from Hugging Face, such as that of NLLB-200. M-CLIP (Carlsson et al. 2022) has a
multilingual text encoder in one folder and a CLIP model for images in another.
"""

import contextlib
import dataclasses
import functools
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
from input_pipeline.preprocessing import Preprocessing
from input_pipeline.tokenizers import HuggingFaceTokenizer, Tokenizer, from_checkpoint
from xlir import partition
from xlir.config import Group, Text, Whole, check_config, read_field
from xlir.embed import SIDES
from xlir.encoder import Encoder
from xlir.models import (
    bert,
    clip,
    dual_encoder,
    open_clip,
    open_clip_text,
    pretrained,
    registry,
    siglip,
    siglip2,
    siglip_text,
    towers,
)
from xlir.models.family import Family, TowerSpec
from xlir.models.transformer import WIDTH

log = logging.getLogger(__name__)

# `model_type` of the models of `transformers` that hold both towers -> their tensors beside the
# towers and the projections. SigLIP 2 of one resolution is published as "siglip", and NaFlex as
# "siglip2".
DUAL_ENCODERS = {
    "clip": ("logit_scale",),
    "metaclip_2": ("logit_scale",),
    "siglip": ("logit_scale", "logit_bias"),
    "siglip2": ("logit_scale", "logit_bias"),
}
# `model_type` of the models whose image tower M-CLIP uses.
CLIP_IMAGES = ("clip", clip.CLIP.name)
# The linear layers after the towers, and the families that are also published without them.
PROJECTIONS = {"text": "text_projection.weight", "image": "visual_projection.weight"}
WITHOUT_PROJECTION = (siglip_text.SIGLIP_TEXT, siglip.SIGLIP, siglip2.NAFLEX)
# Family of an image tower -> the image processor of folders that describe none.
PROCESSORS = {
    clip.CLIP: "CLIPImageProcessor",
    siglip.SIGLIP: "SiglipImageProcessor",
    siglip2.NAFLEX: "Siglip2ImageProcessor",
}
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# The maximum number of tokens if open_clip's config does not set it.
OPEN_CLIP_LENGTH = 77

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
      text: the folder of the text encoder: M-CLIP, open_clip or a dual encoder of `transformers`.
      image: the folder of the image encoder. It is the same folder as `text`, except that M-CLIP's
        and open_clip's texts may have images of CLIP in Hugging Face's layout or of open_clip.
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
    _check_layouts(of_text, of_image)
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


def _check_layouts(text: Published, image: Published) -> None:
    """Raises ValueError if the folders can't be one model, or lack the temperature or the bias."""
    _check_layout("text", text, ("M-CLIP", *DUAL_ENCODERS))
    if text.layout not in DUAL_ENCODERS:
        _check_layout("image", image, CLIP_IMAGES)
    elif image is not text:
        raise ValueError(
            f"--image: {text.folder} ({text.layout}) has an image tower of its own, which its "
            "texts were trained with: leave out --image"
        )
    else:
        lacking = [name for name in DUAL_ENCODERS[text.layout] if name not in text.weights]
        if lacking:
            raise ValueError(f"{text.folder}: its weights lack {', '.join(lacking)}")


def _check_layout(flag: str, published: Published, known: tuple[str, ...]) -> None:
    if published.layout not in ("open_clip", *known):
        raise ValueError(
            f"--{flag}: {published.folder} has no {OPEN_CLIP_CONFIG}, and the model_type in its "
            f"config.json is {published.layout!r}; known: {', '.join(known)}"
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


def _text_side(published: Published) -> tuple[Side, Tokenizer]:
    if published.layout in DUAL_ENCODERS:
        side = _projected("text", published.config, published.weights)
    else:
        is_m_clip = published.layout == "M-CLIP"
        side = _m_clip_text(published) if is_m_clip else _open_clip_text(published)
    family, config = side.spec.family, side.spec.config
    tokenizer = from_checkpoint(
        published.folder,
        family.tokenizer_fields(config),
        full_length=family.full_length(config),
    )
    if published.layout == "open_clip":
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise ValueError("M2M-100's tokenizer is not supported in open_clip's layout")
        text = published.config["model_cfg"]["text_cfg"]
        canonical = (text.get("tokenizer_kwargs") or {}).get("clean") == "canonicalize"
        return side, tokenizer.cleaned(canonical=canonical)
    return side, tokenizer


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
    supported = {
        "tokenizer_mode": (None, ""),
        "tokenizer_kwargs": (None, {}, {"clean": "whitespace"}, {"clean": "canonicalize"}),
    }
    for field, values in supported.items():
        if text.get(field) not in values:
            raise ValueError(f"text_cfg.{field} {text[field]!r} is not supported")
    if not text.get("hf_model_name"):
        own = open_clip_text.hugging_face_names(published.weights)
        return _projected("text", open_clip_text.text_config(model), own)
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
        # The older name of hf_pooler_type is pooler_type.
        text.get("hf_pooler_type", text.get("pooler_type", "mean_pooler")),
    )


def _pooling(family: Family, pooler: str | None) -> str:
    """The pooling that open_clip's pooler stands for; None is its default for the family."""
    known = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "cls"}
    known["cls_pooler"] = "pooler" if "pooler" in family.poolings else "cls"
    known[None] = "mean" if family is bert.ROBERTA else known["cls_pooler"]
    if pooler not in tuple(known):
        raise ValueError(f"text_cfg.hf_pooler_type {pooler!r} is not supported")
    return known[pooler]


def _transformer(
    name: str,
    weights: Weights,
    options: dict[str, Any],
    head: Weights,
    dim: int,
    pooler: str | None = "mean_pooler",
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
    pooling = _pooling(family, pooler)
    return Side(
        options={**options, "pooling": pooling, "max_length": length},
        spec=TowerSpec(family, architecture, pooling),
        tower=family.rename(weights, architecture, pooling),
        head=head,
        dim=dim,
    )


def _image_side(published: Published) -> Side:
    config, weights = published.config, published.weights
    if published.layout == "open_clip":
        vision = open_clip.vision_config(config)
        preprocessing = open_clip.preprocessing(config, vision["image_size"])
        return _projected("image", vision, open_clip.hugging_face_names(weights), preprocessing)
    family = registry.family_of("image", config)
    try:
        described = pretrained.read_preprocessing(published.folder)
        preprocessing = Preprocessing.from_config(described)
    except FileNotFoundError:
        described = {"image_processor_type": PROCESSORS[family]}
        size = family.image_size(config)
        preprocessing = Preprocessing.from_config(described).resized(size)
        log.warning(
            "%s has no preprocessor_config.json: photos are prepared as by the defaults of %s, "
            "at %d pixels a side",
            *(published.folder, PROCESSORS[family], size),
        )
    return _projected("image", config, weights, preprocessing)


def _projected(
    side: str,
    config: Mapping[str, Any],
    weights: Weights,
    preprocessing: Preprocessing | None = None,
) -> Side:
    """One side of CLIP, MetaCLIP 2 or SigLIP. SigLIP's towers need no projection after them."""
    family = registry.family_of(side, config)
    family.check(config)
    spec = TowerSpec(family, config, preprocessing=preprocessing)
    options, head, weights = {"head": "none"}, {}, dict(weights)
    if family in WITHOUT_PROJECTION and PROJECTIONS[side] not in weights:
        dim = towers.width(spec)
    else:
        (projection,) = _pop(weights, PROJECTIONS[side])
        options, head, dim = {"head": "linear"}, {"kernel": projection.T}, len(projection)
    if side == "text":
        options["max_length"] = family.longest_text(config)
    return Side(options, spec, family.rename(weights, config, spec.pooling), head, dim)


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
                loaded[side] = pretrained.abstract(functools.partial(towers.create, spec, options))
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
