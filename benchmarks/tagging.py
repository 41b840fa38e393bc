"""Throughput of tagging, and the share of time that the towers take.

    python benchmarks/tagging.py --workdir=runs/flickr8k --images=PATH/images

Tags 1,000 photos with a vocabulary of 1,000 names, as the command `tag` does. The first pass
compiles; the second one measures the share of time in the towers' forward passes.
"""

import argparse
import itertools
import pathlib
import time

from input_pipeline import vocabularies
from xlir import reference_photos, tagging
from xlir.commands import tag
from xlir.embed import SIDES
from xlir.encoder import Encoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--tags", type=int, default=1000)
    arguments = parser.parse_args()

    files = tag.find_images([arguments.images])
    files = list(itertools.islice(itertools.cycle(files), arguments.photos))
    encoder = Encoder.load(arguments.workdir)
    reference = reference_photos.reference(encoder, arguments.workdir)
    emoji = vocabularies.load("emoji")
    names = emoji.names_in("de")[: arguments.tags]
    vocabulary = vocabularies.Vocabulary("names", emoji.tags[: arguments.tags], {"de": names})

    forward = dict.fromkeys(SIDES, 0.0)
    encoder.embedder.batches = _timed(encoder.embedder.batches, forward)
    for run in ("with compilation", "measured"):
        forward.update(dict.fromkeys(SIDES, 0.0))
        start = time.perf_counter()
        tagger = tagging.Tagger(encoder, vocabulary, "de", reference)
        for batch, images in tagging.embed_files(encoder, files, print):
            for file, tags in zip(batch, tagger.tag(images, top_k=5), strict=True):
                tag.json_line(tag.record(file, "de", tags))
        total = time.perf_counter() - start
        parts = ", ".join(f"{side} tower {spent:.1f} s" for side, spent in forward.items())
        print(
            f"{run}: {len(files) / total:.1f} photos/s, {total:.1f} s: {parts}; "
            f"towers {sum(forward.values()) / total:.1%}"
        )


def _timed(batches, forward: dict[str, float]):
    """Wraps `Embedder.batches`, to add up the time that the embedder takes for each batch."""

    def timed(side: str, inputs):
        for batch in batches(side, inputs):
            start = time.perf_counter()
            yield batch
            forward[side] += time.perf_counter() - start

    return timed


if __name__ == "__main__":
    main()
