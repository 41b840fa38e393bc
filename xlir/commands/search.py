"""Search an index of photos, with texts in any language or with a photo.

Each QUERY is a search of its own. In every search, --and and --image add to what photos should
show, and --not names what they should not show. Embeddings of --not are subtracted with weight
0.5, and those of the other parts are added with weight 1 (docs/results.md compares weights).

The number beside a photo is its calibrated percentile: 0.3 means that for 30% of the run's
validation captions, even the best photo fits less well. Photos below --cutoff are not shown; if
none is left, nothing in the index fits. If a query has a photo, or the index could not be
calibrated, the number is the cosine similarity, and --cutoff does not apply.

--where is one or several terms, joined by `and`; each may begin with `not`:
  folder NAME/NAME      in or below such a folder; /NAME/NAME begins at the root
  name PATTERN          the file's name; * is any text
  taken DATE..DATE      a DATE is 2023, 2023-06 or 2023-06-15; one of the two may be left out
  width N..N, height N..N   pixels

Needs `pip install 'xlir[search]'`; --engine=onnxruntime also `xlir[onnxruntime]`.

Examples:
  python -m xlir.main search --index=photos.index "ein Hund am Strand" "해변의 개"
  python -m xlir.main search --index=photos.index "deniz" --not="insanlar" \\
      --where="folder holidays and taken 2021..2023-06"
  python -m xlir.main search --index=photos.index --image=dog.jpg --sheet=like-dog.png
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

from absl.flags import FlagValues

from input_pipeline import files, photo_limits
from xlir.commands import outputs, processes
from xlir.commands.errors import UsageError
from xlir.commands.flags import Flags

WORDS = "QUERY..."
# At this cutoff, one in twenty validation captions finds no validation photo.
CUTOFF = 0.05


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.string("index", "Folder of the index.", needed=True)
    flags.string("image", "A photo to search for; alone, or together with each QUERY.")
    flags.texts("and", "What else the photos should show.")
    flags.texts("not", "What the photos should not show.")
    flags.integer("top_k", "Largest number of photos for a query; default: 10.", least=1, most=1000)
    flags.string("where", "Which photos to consider; see above.", default="")
    flags.number(
        "cutoff",
        f"Show only photos with at least this percentile, from 0 to 1; default: {CUTOFF}.",
    )
    flags.switch(
        "exact", "Compare with every photo; otherwise a search in a large index may miss a few."
    )
    flags.engine()
    outputs.define(flags, "the photos", "the photos that were found")


def run(values: FlagValues, *queries: str) -> None:
    """Searches."""
    _check(values, queries)
    from xlir import search

    search.check_installed()
    from xlir.search import filters

    filters.parse(values.where)
    image = [photo_limits.read(values.image)] if values.image else []
    processes.start_jax(values)
    from xlir.search.index import Index

    index = Index.open(values.index, engine=values.engine)
    found = []
    with outputs.opened(values.output) as output:
        for query in queries or [""]:
            parts = [*([query] if query else []), *values["and"].value, *image]
            hits = index.search(
                *parts,
                without=values["not"].value,
                count=values.top_k or 10,
                where=values.where,
                cutoff=CUTOFF if values.cutoff is None else values.cutoff,
                exact=values.exact,
            )
            found.append((query or values.image, hits))
            if output:
                output.write(json_line(query, hits) + "\n")
            if output is not sys.stdout:
                print(table(query or f"[{values.image}]", hits))
    if values.sheet:
        _draw(index, found, pathlib.Path(values.sheet))


def _check(values: FlagValues, queries: Sequence[str]) -> None:
    """Refuses invalid values of flags, and files that can't be written."""
    if not queries and not values.image:
        raise UsageError("search needs a query, or --image")
    if values.cutoff is not None and not 0 <= values.cutoff <= 1:
        raise UsageError(f"--cutoff={values.cutoff} is not between 0 and 1")
    if any(not query.strip() for query in queries):
        raise UsageError("a query is empty")
    outputs.check(values)


def json_line(query: str, hits: Sequence) -> str:
    """A query and its hits as one line of JSON, with the fields of `xlir.search.index.Hit`."""
    fields = [dataclasses.asdict(hit) for hit in hits]
    for one in fields:
        one |= {name: round(value, 5) for name, value in one.items() if isinstance(value, float)}
    return json.dumps({"query": query, "hits": fields}, ensure_ascii=False)


def table(query: str, hits: Sequence) -> str:
    """A query and its hits for the terminal, a row per photo."""
    rows = []
    for hit in hits:
        number = hit.cosine if hit.percentile is None else hit.percentile
        rows.append(f"{number:7.3f}  {files.printable(hit.path)}")
    return "\n".join([files.printable(query), *(rows or ["  nothing fits"])])


def _draw(index, found: Sequence[tuple[str, Sequence]], file: pathlib.Path) -> None:
    """Draws the best photos of each query, from the thumbnails in the index."""
    from xlir import figures

    thumbnails = [index.thumbnails([hit.id for hit in hits]) for _, hits in found]
    figures.plot_hits([query for query, _ in found], thumbnails, file)
