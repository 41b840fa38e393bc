"""The section about tags: how good they are, and whether a threshold means the same everywhere."""

from collections.abc import Mapping
from typing import Any

from xlir.report import charts, languages
from xlir.report.markup import Markup, join, note, table

# Threshold in the results -> what it is called; the first two are drawn.
THRESHOLDS = {"one_percentile": "percentile", "one_cosine": "cosine"}


def section(results: Mapping[str, Any], target: int) -> Markup:
    """A table of tagging by language.

    Args:
      results: as `evaluate_tagging.evaluate_set` returns them.
      target: the number of tags per photo that the thresholds were chosen for.
    """
    found = results["languages"]
    counts = {
        code: [result["predicted_tags"][name] for name in THRESHOLDS]
        for code, result in found.items()
    }
    most = max(target, *(value for values in counts.values() for value in values))
    rows: list[tuple[str, ...]] = []
    for group, members in languages.grouped(found).items():
        rows.append((group,))
        for code in members:
            f1 = next(value for name, value in found[code].items() if name.startswith("micro_F1"))
            numbers = (f"{100 * found[code]['mAP']:.1f}", f"{100 * f1:.1f}")
            per_photo = (f"{value:.1f}" for value in counts[code])
            dots = charts.dots(counts[code], target, most)
            rows.append((languages.name(code), dots, *per_photo, *numbers))
    told = (
        f"{results['images']:,} photos, {results['tags']:,} tags, {results['tags_per_image']:.1f} "
        f"true tags a photo (from {results['labels']}). One threshold for all languages is set so "
        f"that a photo gets {target} tags, where the line is. With the calibrated percentile (the "
        "first colour), all languages should lie near it; with a plain cosine (the second colour), "
        "they need not."
    )
    head = ("Language", "Tags a photo", "percentile", "cosine", "mAP, %", "F1, %")
    return join([note(told), table("Tags by language", head, rows, "numbers")])
