"""Tags of the photos of an index: the names of emoji that fit a photo, in 14 languages.

The percentile of a tag is the percentile that the photo has in a search for the tag. So tags and
searches agree on what fits a photo, and tags need no data set: all that is compared is in the
index. (The command `tag` instead compares with photos of a run's data set; see `xlir.tagging`.)
"""

import asyncio
import collections
import contextlib
import dataclasses
import threading
from collections.abc import Awaitable, Callable, Sequence

import anyio.to_thread
import numpy as np
from fastapi import HTTPException
from jaxtyping import Float

from input_pipeline import vocabularies
from xlir import embed
from xlir.search import api
from xlir.search.calibration import Calibration

VOCABULARY = "emoji"
# The number of names embedded in one call. A search that comes meanwhile waits for this call only.
NAMES_AT_ONCE = 64
# Embeddings are kept for this many languages: those that were used last.
MOST_LANGUAGES = 8

EmbedTexts = Callable[[Sequence[str]], Awaitable[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Names:
    """The tags of a language.

    Attributes:
      names: the tags themselves; no name occurs twice.
      vectors: their embeddings, of unit length.
      offsets: the numbers to add to their cosines to get scores (`Calibration.offsets`); zeros if
        the index is not calibrated.
    """

    names: list[str]
    vectors: Float[np.ndarray, "names dim"]
    offsets: Float[np.ndarray, " names"]


class Tags:
    """Finds the tags of photos. The names of a language are embedded when they are first needed.

    Args:
      embed_texts: embeds texts, as `Service.embed` does; returns a vector of unit length for each.
      calibration: that of the index; None if it has none.
    """

    def __init__(self, embed_texts: EmbedTexts, calibration: Calibration | None):
        self._embed_texts, self._calibration = embed_texts, calibration
        self._known: vocabularies.Vocabulary | None = None
        self._loading, self._one_language = threading.Lock(), asyncio.Lock()
        self._kept: collections.OrderedDict[str, Names] = collections.OrderedDict()
        self._tasks: dict[str, asyncio.Task[Names]] = {}

    async def languages(self) -> list[str]:
        """The languages that have tags; empty if the vocabulary is not installed."""
        vocabulary = await anyio.to_thread.run_sync(self._vocabulary)
        return vocabulary.languages() if vocabulary else []

    async def of_photo(
        self, photo: Float[np.ndarray, " dim"], language: str, count: int, cutoff: float
    ) -> list[api.Tag]:
        """The tags that fit an embedded photo best, the best first.

        Args:
          photo: its embedding, of unit length.
          language: one of `languages`.
          count: the largest number of tags.
          cutoff: tags with a lower percentile are left out; tags without one are kept.

        Raises:
          HTTPException: the vocabulary is not installed (404), or lacks the language (422).
          Full: too many searches are waiting.
        """
        known = await self.languages()
        if not known:
            raise HTTPException(
                404, "the names of tags are not installed: pip install 'xlir[quickstart]'"
            )
        if language not in known:
            raise HTTPException(422, f"only the languages {' '.join(known)} have tags")
        return self._best(await self._names(language), photo, count, cutoff)

    def close(self) -> None:
        """Stops embedding names."""
        for task in self._tasks.values():
            task.cancel()

    def _best(self, names: Names, photo: np.ndarray, count: int, cutoff: float) -> list[api.Tag]:
        cosines = names.vectors @ photo
        scores = cosines + names.offsets
        best = embed.top_k(scores, count)
        shares: list[float | None] = [None] * len(best)
        if self._calibration is not None:
            shares = self._calibration.of_scores(scores[best]).tolist()
        return [
            api.Tag(
                tag=names.names[row],
                cosine=round(float(cosines[row]), 5),
                percentile=None if share is None else round(share, 5),
            )
            for row, share in zip(best, shares, strict=True)
            if share is None or share >= cutoff
        ]

    async def _names(self, language: str) -> Names:
        """The names of a language, embedded."""
        if language in self._kept:
            self._kept.move_to_end(language)
            return self._kept[language]
        if language not in self._tasks:
            self._tasks[language] = asyncio.create_task(self._embedded(language))
        # If this request is cancelled, the names are still embedded, for later requests.
        return await asyncio.shield(self._tasks[language])

    async def _embedded(self, language: str) -> Names:
        """Embeds the names of a language in small parts, to let searches in between."""
        try:
            async with self._one_language:
                names = list(dict.fromkeys(one for one, *_ in self._known.names_in(language)))
                parts = [
                    await self._embed_texts(names[start : start + NAMES_AT_ONCE])
                    for start in range(0, len(names), NAMES_AT_ONCE)
                ]
                vectors, offsets = np.concatenate(parts), np.zeros(len(names), np.float32)
                if self._calibration is not None:
                    offsets = await anyio.to_thread.run_sync(self._calibration.offsets, vectors)
                embedded = self._kept[language] = Names(names, vectors, offsets)
                if len(self._kept) > MOST_LANGUAGES:
                    self._kept.popitem(last=False)
                return embedded
        finally:
            del self._tasks[language]

    def _vocabulary(self) -> vocabularies.Vocabulary | None:
        """The names of all tags; None if they are not installed."""
        with self._loading, contextlib.suppress(FileNotFoundError):
            self._known = self._known or vocabularies.load(VOCABULARY)
        return self._known
