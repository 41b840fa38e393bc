"""Writes sentence-transformers and transformers models from a run's two towers and heads.

All files are JSON and safetensors. So writing them does not need those two libraries; only the
check does.
"""

import importlib.util
import json
import pathlib
from typing import Any

import numpy as np

from input_pipeline.preprocessing import RESAMPLING
from xlir.embed import SIDES
from xlir.encoder import Encoder
from xlir.export import dual_encoders
from xlir.export.architecture import HeadLayer, head_layers, tower_weights
from xlir.models import pretrained, sentence_modules

# The package of sentence-transformers' modules; `TYPES` maps our module names to theirs.
_MODULES = "sentence_transformers.base.modules"
# A dense layer that belongs to a tower, not to a head. The check tells them apart by this name.
TOWER_DENSE = "TowerDense"
TYPES = {
    "Router": f"{_MODULES}.router.Router",
    "Transformer": f"{_MODULES}.transformer.Transformer",
    "Dense": f"{_MODULES}.dense.Dense",
    TOWER_DENSE: f"{_MODULES}.dense.Dense",
    "Normalize": f"{_MODULES}.normalize.Normalize",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "LayerNorm": "sentence_transformers.sentence_transformer.modules.layer_norm.LayerNorm",
}
# Fields of a config.json that describe the original checkpoint or its code; they are dropped.
_DROPPED_FIELDS = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "id2label",
    "label2id",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
)
PAD_TOKENS = ("<pad>", "[PAD]")
# The image processor of transformers that resizes in float32.
FLOAT_PROCESSOR = "DINOv3ViTImageProcessor"
WEIGHTS_FILE = "model.safetensors"


def unfit_for_sentence_transformers(encoder: Encoder) -> str:
    """Why sentence-transformers can't represent an encoder; an empty string if it can."""
    reasons = []
    for side in SIDES:
        spec = encoder.specs[side]
        if not spec.family.outputs:
            reasons.append(f"the format has no {side} tower {spec.family.name!r}")
        elif spec.pooling not in spec.family.outputs:
            reasons.append(f"the format's mean over {spec.family.name} includes the class token")
    return "; ".join(reasons + _unfit_preprocessing(encoder))


def unfit_for_transformers(encoder: Encoder) -> str:
    """Why no dual encoder of `transformers` can represent an encoder; an empty string if one can.

    Two towers that were trained together have a class of their own (`dual_encoders.CLASSES`). All
    other pairs, and such towers with other poolings or heads, need VisionTextDualEncoderModel.
    """
    reasons = []
    if dual_encoders.fitting(encoder) is None:
        reasons = _unfit_vision_text(encoder)
        known = dual_encoders.of_towers(encoder)
        if reasons and known is not None:
            reasons = dual_encoders.unfit(encoder, known)
    if prefix := getattr(encoder.tokenizer, "prefix", ""):
        reasons.append(f"the format puts nothing before texts, and text.prefix is {prefix!r}")
    return "; ".join(reasons + _unfit_preprocessing(encoder))


def _unfit_vision_text(encoder: Encoder) -> list[str]:
    """Why VisionTextDualEncoderModel can't represent an encoder."""
    reasons = []
    for side in SIDES:
        spec, head = encoder.specs[side], encoder.config[side].head
        known = spec.family.dual_encoder_pooling
        if not known:
            reasons.append(f"the format has no {side} tower {spec.family.name!r} in such a pair")
        elif spec.pooling != known:
            reasons.append(f"the format's {side} pooling is {known!r}, not {spec.pooling!r}")
        if head != "linear":
            reasons.append(f"the format's {side} head is a matrix without bias, not {head!r}")
    return reasons


def _unfit_preprocessing(encoder: Encoder) -> list[str]:
    options = encoder.preprocessing
    if options.crop == "center_rounded":
        return ["transformers' image processors round odd margins differently than torchvision"]
    if options.dtype == "float32" and importlib.util.find_spec("torchvision") is None:
        return [f"{FLOAT_PROCESSOR} of transformers needs torchvision, which is not installed"]
    return []


def write_sentence_transformers(encoder: Encoder, folder: pathlib.Path) -> None:
    """Writes a Router with one route per side, followed by normalisation."""
    types: dict[str, str] = {}
    routes: dict[str, list[str]] = {}
    for side in SIDES:
        routes[side] = []
        for index, (kind, write) in enumerate(_modules(encoder, side)):
            name = f"{side}_{index}_{kind}"
            (folder / name).mkdir()
            write(folder / name)
            types[name] = TYPES[kind]
            routes[side].append(name)
    _json(
        folder / "router_config.json",
        {
            "types": types,
            "structure": routes,
            "parameters": {
                "default_route": "text",
                "allow_empty_key": True,
                "route_mappings": {f"(None, '{side}')": side for side in routes},
            },
        },
    )
    (folder / "1_Normalize").mkdir()
    _json(folder / "1_Normalize" / "config.json", {})
    modules = (("Router", ""), ("Normalize", "1_Normalize"))
    _json(
        folder / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": TYPES[kind]}
            for index, (kind, path) in enumerate(modules)
        ],
    )
    prefix = encoder.tokenizer.prefix
    _json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            # The prefix goes before every text: captions as well as queries.
            "prompts": {"text": prefix} if prefix else {},
            "default_prompt_name": "text" if prefix else None,
            "similarity_fn_name": "cosine",
        },
    )


def write_transformers(encoder: Encoder, folder: pathlib.Path) -> None:
    """Writes a dual encoder of `transformers` with its tokenizer and image processor.

    It is the towers' own class if there is one that fits, otherwise VisionTextDualEncoderModel.
    """
    known, scale = dual_encoders.fitting(encoder), np.log(np.float32(encoder.scale))
    config: dict[str, Any] = {
        "architectures": ["VisionTextDualEncoderModel" if known is None else known.name],
        "model_type": "vision-text-dual-encoder" if known is None else known.model_type,
    }
    weights, parts = {}, {}
    for side, name in (("text", "text"), ("image", "vision")):
        tower = _published(encoder, side)
        weights |= {f"{name}_model.{weight}": value for weight, value in tower.items()}
        parts[name] = _config(encoder, side)
        if known is not None:
            parts[name]["model_type"] = f"{known.model_type}_{name}_model"
    if known is None or known.head == "linear":
        dim = encoder.config.embedding_dim
        config |= {"projection_dim": dim, "logit_scale_init_value": float(scale)}
        for side, name in (("text", "text"), ("image", "visual")):
            weights[f"{name}_projection.weight"] = head_layers(encoder, side)[0].weight
        weights["logit_scale"] = scale
        if known is not None:
            parts = {name: part | {"projection_dim": dim} for name, part in parts.items()}
    else:
        weights["logit_scale"] = scale[None]
        weights["logit_bias"] = np.float32(encoder.parameters.trained["bias"])[None]
    pretrained.save(weights, folder / WEIGHTS_FILE)
    _json(folder / "config.json", config | {f"{name}_config": x for name, x in parts.items()})
    _write_tokenizer(encoder, folder)
    processor = "VisionTextDualEncoderProcessor" if known is None else known.processor
    described = _image_processor(encoder) | {"processor_class": processor}
    _json(folder / "preprocessor_config.json", described)


def _modules(encoder: Encoder, side: str) -> list[tuple[str, Any]]:
    """The modules of one route: each module's type and the function that writes its folder."""
    spec = encoder.specs[side]
    output, pooling = spec.family.outputs[spec.pooling]
    dense = _tower_dense(encoder, side)
    dim = dense[0][0].weight.shape[1] if dense else encoder.feature_dims[side]
    modules = [("Transformer", lambda folder: _write_tower(encoder, side, folder, output, pooling))]
    if pooling:
        config = {"embedding_dimension": dim, "pooling_mode": pooling, "include_prompt": True}
        modules.append(("Pooling", lambda folder: _json(folder / "config.json", config)))
    for layer, activation in dense:
        modules.append(
            (TOWER_DENSE, lambda folder, x=layer, a=activation: _write_dense(folder, x, a))
        )
    layers = head_layers(encoder, side)
    for index, layer in enumerate(layers):
        if layer.kind == "norm":
            modules.append(("LayerNorm", lambda folder, layer=layer: _write_norm(folder, layer)))
        elif layer.kind == "dense":
            gelu = index + 1 < len(layers) and layers[index + 1].kind == "gelu"
            activation = "gelu" if gelu else "identity"
            modules.append(
                ("Dense", lambda folder, x=layer, a=activation: _write_dense(folder, x, a))
            )
    return modules


def _tower_dense(encoder: Encoder, side: str) -> list[tuple[HeadLayer, str]]:
    """The dense layers at the end of a text tower, with the names of their activations."""
    weights, layers = encoder.weights(f"{side}_tower"), []
    for index, layer in enumerate(encoder.specs[side].dense):
        kernel, bias = (weights.get(f"dense.{index}.{part}") for part in ("kernel", "bias"))
        layers.append((HeadLayer("dense", kernel.T, bias), layer["activation"]))
    return layers


def _write_tower(
    encoder: Encoder, side: str, folder: pathlib.Path, output: str, pooling: str | None
) -> None:
    """Writes a tower's checkpoint and the config file of a sentence-transformers module."""
    _json(folder / "config.json", _config(encoder, side))
    pretrained.save(_published(encoder, side), folder / WEIGHTS_FILE)
    modality = "text"
    options: dict[str, Any] = {}
    if side == "text":
        _write_tokenizer(encoder, folder)
    else:
        modality = "image"
        _json(folder / "preprocessor_config.json", _image_processor(encoder))
        if encoder.preprocessing.dtype == "uint8":
            # Training resizes with PIL; torchvision's resize differs in the last bit.
            options["processor_kwargs"] = {"backend": "pil"}
    if encoder.specs[side].family.pooler_is_optional and output != "pooler_output":
        options["model_kwargs"] = {"add_pooling_layer": False}
    _json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {modality: {"method": "forward", "method_output_name": output}},
            "module_output_name": "token_embeddings" if pooling else "sentence_embedding",
            **options,
        },
    )


def _write_norm(folder: pathlib.Path, layer) -> None:
    _json(folder / "config.json", {"dimension": len(layer.weight)})
    pretrained.save({"norm.weight": layer.weight, "norm.bias": layer.bias}, folder / WEIGHTS_FILE)


def _write_dense(folder: pathlib.Path, layer: HeadLayer, activation: str) -> None:
    dim, features = layer.weight.shape
    names = {ours: theirs for theirs, ours in sentence_modules.ACTIVATIONS.items()}
    _json(
        folder / "config.json",
        {
            "in_features": features,
            "out_features": dim,
            "bias": layer.bias is not None,
            "activation_function": names[activation],
            "module_input_name": "sentence_embedding",
            "module_output_name": "sentence_embedding",
        },
    )
    bias = {} if layer.bias is None else {"linear.bias": layer.bias}
    pretrained.save({"linear.weight": layer.weight} | bias, folder / WEIGHTS_FILE)


def _published(encoder: Encoder, side: str) -> dict[str, np.ndarray]:
    """A tower's weights under their names in `transformers`."""
    weights = tower_weights(encoder, side)
    weights = {name: x for name, x in weights.items() if not name.startswith("dense.")}
    return encoder.specs[side].family.restore(weights, _config(encoder, side))


def _config(encoder: Encoder, side: str) -> dict[str, Any]:
    """The config.json of a tower: that of its original checkpoint, with the run's changes."""
    spec = encoder.specs[side]
    config = spec.family.hub_config(spec, pad_id=_pad_token(encoder)[1])
    config = {name: x for name, x in config.items() if name not in _DROPPED_FIELDS}
    return config | {"dtype": "float32"}


def _image_processor(encoder: Encoder) -> dict[str, Any]:
    """The preprocessor_config.json that reproduces a run's preprocessing."""
    options = encoder.preprocessing
    size, resize, squash = options.size, options.resize, options.crop == "squash"
    processor: dict[str, Any] = {
        "do_resize": True,
        "resample": int(RESAMPLING[options.resample]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(options.mean),
        "image_std": list(options.std),
        "do_convert_rgb": True,
    }
    floating = options.dtype == "float32"
    if squash and resize == size:
        return processor | {
            "image_processor_type": FLOAT_PROCESSOR if floating else "ViTImageProcessor",
            "size": {"height": size, "width": size},
        }
    return processor | {
        "image_processor_type": FLOAT_PROCESSOR if floating else "CLIPImageProcessor",
        "size": {"height": resize, "width": resize} if squash else {"shortest_edge": resize},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
    }


def _pad_token(encoder: Encoder) -> tuple[str, int]:
    """The padding token and its id.

    A tokenizer without a padding token pads with another special token. Padding is masked, so the
    token does not change the embeddings. SigLIP does not mask it; its tokenizer says which it is.
    """
    special = encoder.tokenizer.special_tokens()
    if padding := getattr(encoder.tokenizer, "padding", None):
        return next(token for token, id in special.items() if id == padding.id), padding.id
    chosen = next((token for token in PAD_TOKENS if token in special), next(iter(special)))
    return chosen, special[chosen]


def _write_tokenizer(encoder: Encoder, folder: pathlib.Path) -> None:
    encoder.tokenizer.save_vocabulary(folder)
    padded = getattr(encoder.tokenizer, "padding", None) is not None
    _json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": encoder.config.text.max_length,
            "pad_token": _pad_token(encoder)[0],
            "padding_side": "right",
            "truncation_side": "right",
            # A model whose tokens attend to the padding takes no mask.
            "model_input_names": ["input_ids"] + ([] if padded else ["attention_mask"]),
            "clean_up_tokenization_spaces": False,
        },
    )


def _json(file: pathlib.Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
