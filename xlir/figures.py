"""Figures of an evaluation: recall by language, example queries with results, tagged photos."""

import importlib.util
import os
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import font_manager, pyplot
from matplotlib.ft2font import FT2Font

from input_pipeline import images as image_io
from input_pipeline import photo_limits
from xlir import metrics
from xlir.embed import top_k

# Draw off-screen: training runs on machines without a screen.
matplotlib.use("Agg")

# A PyPI package (extra `quickstart`) with Noto Sans CJK, and fonts that systems may have.
CJK_PACKAGE = "cvttf_NotoSansCJK_Regular"
CJK_FAMILIES = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "WenQuanYi Zen Hei")
TOP = 5
EXAMPLES = 8
SHEET_COLUMNS = 4
# Pixels of a picture's longer side.
PREVIEW = 640


def plot_recall(results: Mapping, file: pathlib.Path) -> None:
    """Draws text-to-image Recall@1, 5 and 10 by language; a dotted line is Recall@10 by chance."""
    languages = results["languages"]
    macro = results["zero_shot_macro"]
    names = list(languages) + (["zero-shot\nmean"] if macro else [])
    recalls = [result["text_to_image"] for result in languages.values()]
    recalls += [macro["text_to_image"]] if macro else []
    width = max(1.8 + 0.62 * len(names), 6)
    figure, axes = pyplot.subplots(figsize=(width, 4), layout="constrained")
    places = np.arange(len(names))
    # Recall grows with K, so the bars can be drawn in front of each other.
    for k, shade in ((10, "#b9d3ea"), (5, "#6ba3d0"), (1, "#1f5f99")):
        heights = [100 * recall[f"R@{k}"] for recall in recalls]
        axes.bar(places, heights, 0.72, color=shade, label=f"Recall@{k}")
        for place, height in zip(places, heights, strict=True):
            if k == 10:
                axes.text(place, height + 1, f"{height:.0f}", ha="center", fontsize=8)
    axes.axhline(100 * 10 / results["images"], color="#888", linewidth=1, linestyle=":")
    axes.set_xticks(places, names)
    axes.set_ylim(0, 105)
    axes.set_ylabel("queries with the right image found, %")
    axes.set_title(
        f"{results['dataset']}: text to image, {results['images']} images (dotted: chance at 10)",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def plot_queries(
    captions: Mapping[str, Sequence[str]],
    image_of: Mapping[str, np.ndarray],
    texts: Mapping[str, np.ndarray],
    images: np.ndarray,
    pictures: Sequence,
    file: pathlib.Path,
) -> None:
    """Draws example queries in several languages, each with its five best images.

    Args:
      captions: language -> captions.
      image_of: language -> the row of each caption's image.
      texts: language -> unit-length embeddings of the captions.
      images: unit-length embeddings of the images.
      pictures: the images, as paths or encoded bytes.
      file: where the PNG goes.

    Queries are evenly spaced in the set, not selected by their results. The right image has a green
    frame. Below the query is that image's rank, or its expected rank if others have its score.
    """
    fonts = _fonts()
    languages = _drawable(captions, fonts)
    examples = [languages[i % len(languages)] for i in range(EXAMPLES)]
    with pyplot.rc_context({"font.family": fonts}):
        figure, axes = pyplot.subplots(
            EXAMPLES,
            TOP + 1,
            figsize=(10.5, 1.35 * EXAMPLES),
            width_ratios=[2.4] + [1] * TOP,
            layout="constrained",
        )
        for i, language in enumerate(examples):
            query = (2 * i + 1) * len(captions[language]) // (2 * EXAMPLES)
            scores = images @ texts[language][query]
            right = int(image_of[language][query])
            best = top_k(scores, TOP)
            ranks = metrics.retrieval_ranks(
                texts[language][query : query + 1],
                images,
                np.array([right]),
                np.arange(len(images)),
            )
            _draw_query(axes[i, 0], language, captions[language][query], ranks)
            for axis, row in zip(axes[i, 1:], best, strict=False):
                _draw_picture(axis, pictures[int(row)], right=bool(row == right))
            # The set may have fewer images.
            for axis in axes[i, 1 + len(best) :]:
                axis.axis("off")
        figure.savefig(file, dpi=110)
        pyplot.close(figure)


def plot_tags(
    pictures: Sequence,
    tags: Mapping[str, Sequence[Sequence[str]]],
    file: pathlib.Path,
    most: int | None = None,
) -> None:
    """Draws a contact sheet: pictures with their tags below, one line per language.

    Args:
      pictures: paths or encoded bytes.
      tags: language -> the tags of each picture. Languages that can't be drawn are left out.
      file: where the PNG goes.
      most: largest number of languages, evenly spaced among the drawable ones; None for all.
    """
    fonts = _fonts()
    flat = {code: [name for names in rows for name in names] for code, rows in tags.items()}
    # A language in which no photo has a tag can be drawn.
    languages = [code for code, names in flat.items() if not names or _fits(names, fonts)]
    places = np.linspace(0, len(languages) - 1, min(most or len(languages), len(languages)))
    languages = [languages[int(place)] for place in places]
    columns = min(SHEET_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    lines = 0.17 * 2 * len(languages) + 0.1
    with pyplot.rc_context({"font.family": fonts}):
        figure, axes = pyplot.subplots(
            *(rows, columns),
            figsize=(3.2 * columns, (2.2 + lines) * rows),
            squeeze=False,
            layout="constrained",
        )
        for place, axis in enumerate(axes.flat):
            if place >= len(pictures):
                axis.axis("off")
                continue
            _draw_picture(axis, pictures[place], right=False)
            text = [
                _wrap(f"{code}  {', '.join(tags[code][place]) or '-'}", 38) for code in languages
            ]
            axis.text(0, -0.04, "\n".join(text), transform=axis.transAxes, va="top", fontsize=8)
        figure.savefig(file, dpi=110, bbox_inches="tight")
        pyplot.close(figure)


def plot_hits(
    queries: Sequence[str], pictures: Sequence[Sequence[bytes]], file: pathlib.Path
) -> None:
    """Draws a contact sheet: a row for each query, with the photos that were found, best first.

    Args:
      queries: the texts.
      pictures: encoded photos of each query; empty bytes leave a place free.
      file: where the picture goes.
    """
    columns = max([1, *map(len, pictures)])
    with pyplot.rc_context({"font.family": _fonts()}):
        figure, axes = pyplot.subplots(
            *(len(queries), columns),
            figsize=(2 * columns, 2.3 * len(queries)),
            squeeze=False,
            layout="constrained",
        )
        for row, query, found in zip(axes, queries, pictures, strict=True):
            row[0].set_title(_wrap(query, 28 * columns), loc="left", fontsize=10)
            for place, axis in enumerate(row):
                if place < len(found) and found[place]:
                    _draw_picture(axis, found[place], right=False)
                else:
                    axis.axis("off")
        figure.savefig(file, dpi=110, bbox_inches="tight")
        pyplot.close(figure)


def _draw_query(axes: pyplot.Axes, language: str, caption: str, ranks: metrics.Ranks) -> None:
    axes.axis("off")
    lines = _wrap(caption, 30)
    axes.text(0, 0.5, f"{language}:  {lines}", va="center", fontsize=10)
    rank, tied = float(ranks.expected_rank()[0]), int(ranks.tied[0])
    colour = "#1a7f37" if rank <= TOP else "#b42318"
    label = f"right image: rank {rank:g}" + (f", tied with {tied}" if tied else "")
    axes.text(0, 0.02, label, va="bottom", fontsize=8, color=colour)


def _draw_picture(axes: pyplot.Axes, picture: bytes | str | os.PathLike, *, right: bool) -> None:
    data = picture if isinstance(picture, bytes) else photo_limits.read(picture)
    axes.imshow(image_io.preview(data, PREVIEW))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color="#1a7f37" if right else "#dddddd", linewidth=4 if right else 1)


def _wrap(text: str, width: int) -> str:
    """Breaks a caption into at most four lines; full-width characters count twice."""
    lines, line, used = [], "", 0
    for character in text:
        size = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used + size > width and (size == 2 or character == " "):
            lines.append(line)
            line, used = "", 0
        line += character
        used += size
    lines.append(line)
    kept = [part.strip() for part in lines[:4]]
    return "\n".join(kept) + (" ..." if len(lines) > 4 else "")


def _fonts() -> list[str]:
    """Font families for many scripts; Matplotlib takes a glyph from the first that has it."""
    families = ["DejaVu Sans"]
    spec = importlib.util.find_spec(CJK_PACKAGE)
    if spec and spec.submodule_search_locations:
        for file in pathlib.Path(spec.submodule_search_locations[0]).glob("*.otf"):
            font_manager.fontManager.addfont(file)
            families.append(FT2Font(str(file)).family_name)
    known = {font.name for font in font_manager.fontManager.ttflist}
    return families + [family for family in CJK_FAMILIES if family in known]


def _drawable(captions: Mapping[str, Sequence[str]], families: list[str]) -> list[str]:
    """The languages that the fonts can draw, without English if there are others.

    If the fonts can draw none, these are all languages.
    """
    drawable = [language for language, texts in captions.items() if _fits(texts[:100], families)]
    return [language for language in drawable if language != "en"] or drawable or list(captions)


def _fits(texts: Sequence[str], families: list[str]) -> bool:
    """Whether the fonts can draw (nearly) all of the texts.

    They can't draw right-to-left scripts, which Matplotlib does not shape.
    """
    glyphs: set[int] = set()
    for family in families:
        glyphs |= FT2Font(font_manager.findfont(family)).get_charmap().keys()
    drawn = [
        all(ord(c) in glyphs and unicodedata.bidirectional(c) not in ("R", "AL") for c in text)
        for text in texts
    ]
    return bool(np.mean(drawn) > 0.95)
