"""XTD200 and Flickr30k-200: English captions that NLLB translated into about 200 languages.

Visheratin 2023, https://arxiv.org/abs/2309.01859. The folder is data/xtd200 or data/flickr30k-200
of https://github.com/visheratin/nllb-clip: line i of deu_Latn.txt, and of each other language's
file, belongs to line i of the list of photos. Languages have FLORES-200's codes, except English.
"""

import functools
import pathlib
import re

from input_pipeline.lines import read_lines
from input_pipeline.test_sets.captioned_photos import CaptionedPhotos, from_pairs
from input_pipeline.test_sets.published import MACHINE, Published

CAPTIONS_FILE = re.compile(r"([a-z]{3}_[A-Z][a-z]{3})\.txt")
ENGLISH = "eng_Latn"


def read(name: str, list_file: str, folder: pathlib.Path) -> CaptionedPhotos:
    """Reads the languages that the folder has.

    Raises:
      FileNotFoundError: the list of photos or every caption file is missing.
      ValueError: a file has another number of lines than the list of photos.
    """
    names, pairs = read_lines(folder / list_file), {}
    for file in sorted(folder.iterdir()):
        if match := CAPTIONS_FILE.fullmatch(file.name):
            captions = read_lines(file)
            if len(captions) != len(names):
                raise ValueError(
                    f"{file} has {len(captions)} lines, and {list_file} has {len(names)}"
                )
            language = "en" if match[1] == ENGLISH else match[1]
            pairs[language] = list(zip(names, captions, strict=True))
    if not pairs:
        raise FileNotFoundError(f"{folder} holds no captions such as deu_Latn.txt")
    return from_pairs(name, pairs, names)


def _published(name: str, title: str, list_file: str, terms: str) -> Published:
    return Published(
        name=name,
        title=title,
        read=functools.partial(read, name, list_file),
        photos=1000,
        captions=1000,
        authors=MACHINE,
        origin="https://github.com/visheratin/nllb-clip",
        terms=terms,
    )


SETS = [
    _published(
        *("xtd200", "XTD200", "test_image_names.txt"),
        terms="the repository names no licence; XTD10's, from which it was made, is noncommercial",
    ),
    _published(
        *("flickr30k_200", "Flickr30k-200", "filenames.txt"),
        terms="the repository names no licence; Flickr30k is for research only",
    ),
]
ENTRIES = {one.name: one.entry() for one in SETS}
