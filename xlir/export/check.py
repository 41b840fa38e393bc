"""A script that loads an exported folder and runs the model, without JAX or this package.

Usage: python check.py FORMAT FOLDER INPUTS OUTPUT. INPUTS holds texts.json and images/. The script
writes token ids, pixels (0 to 255), the towers' features and the embeddings to OUTPUT, a .npz file.
"""

import importlib
import io
import json
import pathlib
import runpy
import sys

import numpy as np
from PIL import Image, ImageOps

# The script makes imports of these packages fail, as if they were not installed.
ABSENT = ("jax", "jaxlib", "flax", "xlir", "input_pipeline", "configs")


def run_torch(folder, texts, images):
    """Runs the plain PyTorch format."""
    import torch

    sys.path.insert(0, str(folder))
    package = importlib.import_module("dual_encoder")
    model = package.load(folder)
    tokens, pixels = model.tokenizer(texts), np.stack([model.reader(image) for image in images])
    inputs = importlib.import_module("dual_encoder.inputs")
    with torch.inference_mode():
        ids, mask = map(torch.from_numpy, inputs.pad(tokens))
        features = model.text_tower(ids, mask), model.image_tower(torch.from_numpy(pixels))
    embeddings = model.encode_text(texts), model.encode_image(images)
    return tokens, pixels, features, embeddings


def run_onnx(folder, texts, images):
    """Runs the ONNX graphs in ONNX Runtime."""
    import onnxruntime

    sys.path.insert(0, str(folder))
    inputs = importlib.import_module("inputs")
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    tokens = inputs.load_tokenizer(folder, **config["tokenizer"])(texts)
    reader = inputs.ImageReader(**config["preprocessing"])
    pixels = np.stack([reader(image) for image in images])
    results = []
    ids, mask = inputs.pad(tokens)
    for side, feed in (
        ("text", {"input_ids": ids, "attention_mask": mask.astype(np.int64)}),
        ("image", {"pixels": pixels}),
    ):
        session = onnxruntime.InferenceSession(folder / f"{side}.onnx")
        results.append(session.run(["features", "embeddings"], feed))
    features, embeddings = zip(*results, strict=True)
    return tokens, pixels, features, embeddings


def run_sentence_transformers(folder, texts, images):
    """Runs a SentenceTransformer, which only uses the library's own modules."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    images = [decoded(image) for image in images]
    prefix = model.prompts.get(model.default_prompt_name or "", "")
    routes = json.loads((folder / "router_config.json").read_text(encoding="utf8"))["structure"]
    features, seen = [], {}
    for side, batch in (("text", [prefix + text for text in texts]), ("image", images)):
        modules = list(model[0].sub_modules[side])
        seen[side] = x = modules[0].preprocess(batch)
        x = {**x, "modality": side}
        with torch.inference_mode():
            for name, module in zip(routes[side], modules, strict=True):
                if name.endswith(("_LayerNorm", "_Dense")):  # the head starts here
                    break
                x = module(x)
        features.append(x["sentence_embedding"].numpy())
    embeddings = model.encode(texts, modality="text"), model.encode(images)
    processor = model[0].sub_modules["image"][0].processor
    return unpadded(seen["text"]), denormalized(seen["image"], processor), features, embeddings


def run_transformers(folder, texts, images):
    """Runs a dual encoder of transformers."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    padding = True if "attention_mask" in tokenizer.model_input_names else "max_length"
    text = tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")
    image = processor([decoded(image) for image in images], return_tensors="pt")
    with torch.inference_mode():
        out = model(**text, pixel_values=image["pixel_values"])
        # In the outputs of some classes, the projection has replaced the towers' features.
        towers = model.text_model(**text), model.vision_model(image["pixel_values"])
    features = [tower.pooler_output for tower in towers]
    embeddings = out.text_embeds, out.image_embeds
    return unpadded(text), denormalized(image, processor), features, embeddings


def decoded(data):
    """The image in 8-bit RGB, turned by its EXIF orientation and blended over white."""
    inputs = runpy.run_path(str(pathlib.Path(__file__).parent / "pytorch" / "inputs.py"))
    return inputs["rgb"](ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


def unpadded(batch):
    """The token ids of each text, without padding that is masked."""
    if "attention_mask" not in batch:
        return list(batch["input_ids"].numpy())
    pairs = zip(batch["input_ids"].numpy(), batch["attention_mask"].numpy(), strict=True)
    return [ids[mask != 0] for ids, mask in pairs]


def denormalized(batch, processor):
    """An image processor's pixels without normalisation: [batch, size, size, 3], 0 to 255."""
    pixels = batch["pixel_values"].numpy().transpose(0, 2, 3, 1)
    return (pixels * np.array(processor.image_std) + np.array(processor.image_mean)) * 255


RUN = {
    "torch": run_torch,
    "onnx": run_onnx,
    "sentence-transformers": run_sentence_transformers,
    "transformers": run_transformers,
}


def outputs(format, folder, texts, images):
    """The outputs of all stages of an exported model for texts and encoded images."""
    tokens, pixels, features, embeddings = RUN[format](folder, texts, images)
    return {
        "tokens": np.concatenate(tokens),
        "lengths": np.array([len(ids) for ids in tokens]),
        "pixels": np.asarray(pixels, np.float32),
        "text_features": np.asarray(features[0]),
        "image_features": np.asarray(features[1]),
        "text_embeddings": np.asarray(embeddings[0]),
        "image_embeddings": np.asarray(embeddings[1]),
    }


def main():
    """Runs the exported model on the inputs and writes its outputs."""
    format, folder, inputs, output = sys.argv[1], *map(pathlib.Path, sys.argv[2:])
    sys.modules.update(dict.fromkeys(ABSENT))
    texts = json.loads((inputs / "texts.json").read_text(encoding="utf8"))
    images = [file.read_bytes() for file in sorted((inputs / "images").iterdir())]
    np.savez(output, **outputs(format, folder, texts, images))


if __name__ == "__main__":
    main()
