"""Make a run's folder out of a published dual encoder.

These are CLIP, MetaCLIP 2, SigLIP and SigLIP 2 as `transformers` saves them, open_clip's models
whose texts are those of CLIP, SigLIP or an encoder from Hugging Face (XLM-R, NLLB-200), and M-CLIP.
`eval`, `tag`, `index`, `export` and the Python API then work with the folder as with any run's.
`hf download ID --local-dir=PATH` downloads a published model.

Examples:
  python -m xlir.main import --text=PATH/siglip2-base-patch16-224 --workdir=runs/siglip2
  python -m xlir.main import --text=PATH/M-CLIP --image=PATH/clip-vit-large-patch14 \\
      --workdir=runs/m-clip
  python -m xlir.main import --text=PATH/CLIP-ViT-B-32-xlm-roberta-base --workdir=runs/open_clip
"""

import os
import pathlib

from absl.flags import FlagValues

from xlir.commands.flags import Flags


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.string("text", "Folder of the published model, or of its text encoder.", needed=True)
    flags.string(
        "image",
        "Folder of the published image encoder (M-CLIP); default: the folder of --text.",
    )
    flags.string("workdir", "Folder of the new run.", needed=True)


def run(values: FlagValues) -> None:
    """Imports a model."""
    # Nothing is computed, so JAX need not reserve an accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # transformers warns that it does not know M-CLIP's model type.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from xlir import published

    published.import_model(values.text, values.image or values.text, pathlib.Path(values.workdir))
