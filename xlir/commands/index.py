"""Index photos, so that `search` finds them by queries in any language.

PHOTOS are files, folders (searched at any depth), zip and tar archives, and patterns. The first
call makes the index, and copies the encoder of --workdir into it. Later calls do not need
--workdir, and embed only photos that are new or have changed. After an interruption, the same
command continues where it stopped. Broken photos are skipped; the log names and counts them. Links
inside folders are not followed.

For collections that are too large for one machine, --store keeps the embeddings and thumbnails on
a Milvus server, and --engine=ray embeds on all machines of a Ray cluster. With --store, the folder
of the index is small, and copies of it on other machines search the same photos.

Needs `pip install 'xlir[search]'`; --store also `xlir[milvus]`, and --engine `xlir[ray]` or
`xlir[onnxruntime]`.

Examples:
  python -m xlir.main index --workdir=runs/flickr8k --to=photos.index PHOTOS
  python -m xlir.main index --to=photos.index --exclude=private --exclude='*.gif' --prune PHOTOS
  python -m xlir.main index --workdir=runs/flickr8k --to=photos.index \\
      --from=embeddings.npy paths.txt
  python -m xlir.main index --workdir=runs/flickr8k --to=photos.index --engine=ray \\
      --store=milvus://db:19530/photos PHOTOS
"""

import pathlib
from collections.abc import Sequence

from absl.flags import FlagValues

from input_pipeline import photo_limits
from xlir.commands import processes
from xlir.commands.errors import UsageError
from xlir.commands.flags import Flags

WORDS = "PHOTOS..."


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.string("to", "Folder of the index; it is made if it does not exist.", needed=True)
    flags.string(
        "workdir", "Folder of the run whose encoder the index uses. Only a new index needs it."
    )
    flags.string(
        "store",
        "Where a new index keeps its embeddings: a Milvus collection, milvus://HOST:PORT/NAME. "
        "$MILVUS_TOKEN is its token or USER:PASSWORD. Default: the folder of the index.",
    )
    flags.engine(
        "With --workdir, the graphs are in its folder onnx, and are copied into a new index. "
        "ray: JAX on the cluster at $RAY_ADDRESS, whose machines must all see PHOTOS and the index "
        "under the same paths. ",
        ["ray"],
    )
    flags.texts(
        "exclude",
        "Pattern of files and folders to leave out: a name, or the last parts of a path, "
        "such as private/*.png.",
    )
    flags.switch(
        "prune", "Remove from the index photos that were found in PHOTOS before and are now gone."
    )
    flags.string(
        "from",
        "NumPy file (.npy) of embeddings by the same model, [photos, dim]. They are indexed, and "
        "no photo is embedded. PHOTOS is then one text file with the path of each row's photo.",
    )


def run(values: FlagValues, *words: str) -> None:
    """Makes or extends an index."""
    _check(values, words)
    photo_limits.limit()
    from xlir import search

    search.check_installed()
    processes.start_jax(values)
    from xlir.search.index import Index, is_index

    folder, fleet = pathlib.Path(values.to), "ray" if values.engine == "ray" else None
    engine = "jax" if fleet else values.engine
    if is_index(folder):
        index = Index.open(folder, values.workdir, engine=engine)
        if values.store not in (None, index.store):
            raise UsageError(f"{folder} has another store: leave --store out")
    elif values.workdir is None:
        raise UsageError(f"{folder} is not an index yet: a new index needs --workdir")
    else:
        index = Index.create(folder, values.workdir, values.store, engine=engine)
    if values["from"].value:
        added = index.add_embeddings(values["from"].value, words[0])
    else:
        added = index.add(words, exclude=values.exclude, prune=values.prune, engine=fleet)
    print(
        f"{folder}: {index.count():,} photos ({added.new:,} new, {added.changed:,} changed, "
        f"{added.unchanged:,} unchanged, {added.removed:,} removed, {added.skipped:,} skipped)"
    )


def _for_photos(values: FlagValues) -> bool:
    """Whether a flag for finding or embedding photos is given."""
    return bool(values.prune or values.exclude or values.engine != "jax")


def _check(values: FlagValues, words: Sequence[str]) -> None:
    """Refuses contradictory flags."""
    if not words:
        raise UsageError("index needs photos: files, folders, archives or patterns")
    if values["from"].value and (len(words) > 1 or _for_photos(values)):
        raise UsageError(
            "with --from, give one text file of paths, and no --prune, --exclude or --engine"
        )
