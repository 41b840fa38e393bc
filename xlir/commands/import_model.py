"""Make a run's folder out of a published model of PyTorch, M-CLIP or open_clip.

Its text encoder is one of Hugging Face's. `eval`, `tag`, `export` and the Python API then take the
folder as any run's. `hf download ID --local-dir=PATH` gets a published model.

Examples:
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
    flags.string("text", "Folder of the published text encoder.", needed=True)
    flags.string("image", "Folder of the published image encoder; default: that of --text.")
    flags.string("workdir", "Folder to make.", needed=True)


def run(values: FlagValues) -> None:
    """Imports a model."""
    # Nothing is computed, so other devices are left alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # transformers warns of M-CLIP's model type, which it does not know.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from xlir import published

    published.import_model(values.text, values.image or values.text, pathlib.Path(values.workdir))
