"""What the service's API takes and returns, as OpenAPI describes it."""

from typing import Annotated

import pydantic
from fastapi import Path

# The largest numbers of characters in a text, of unwanted texts in a query, and of photos or tags
# in an answer.
LONGEST, MOST_TEXTS, MOST_HITS = 1000, 8, 200

EXAMPLE = {
    "id": "0d7f5a0b6c1e4a93b2f8",
    "name": "DSC_0412.jpg",
    "path": "/photos/greece/DSC_0412.jpg",
    "cosine": 0.31274,
    "percentile": 0.62,
    "taken": "2023-06-15T18:04:12",
    "width": 4000,
    "height": 3000,
    "size": 3481220,
    "thumbnail": "/api/photos/0d7f5a0b6c1e4a93b2f8/thumbnail",
    "file": "/api/photos/0d7f5a0b6c1e4a93b2f8/file",
}


class Photo(pydantic.BaseModel):
    """A photo of the index.

    `taken` is the time by the camera's clock. `path` is null if the service hides paths, and
    `file` is null if only the thumbnail is served, because the photo lies in an archive.
    """

    model_config = pydantic.ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    id: str
    name: str
    path: str | None
    taken: str | None
    width: int
    height: int
    size: int
    thumbnail: str
    file: str | None


class Found(Photo):
    """A photo that a search found.

    `cosine` is the similarity of query and photo, -1 to 1. `percentile` tells how well the photo
    fits a query of texts, 0 to 1; it is null for queries with a photo, and if the index is not
    calibrated.
    """

    cosine: float
    percentile: float | None


class Answer(pydantic.BaseModel):
    """The photos that fit a query, the best first."""

    hits: list[Found]


class Tag(pydantic.BaseModel):
    """A name that fits a photo.

    `cosine` is the similarity of name and photo, -1 to 1. `percentile` is the percentile that the
    photo has in a search for the name, 0 to 1; it is null if the index is not calibrated.
    """

    model_config = pydantic.ConfigDict(
        json_schema_extra={"examples": [{"tag": "Hund", "cosine": 0.29816, "percentile": 0.41}]}
    )

    tag: str
    cosine: float
    percentile: float | None


class PhotoTags(pydantic.BaseModel):
    """The tags that fit a photo in a language, the best first."""

    language: str
    tags: list[Tag]


class Languages(pydantic.BaseModel):
    """The languages that have tags, as ISO 639 codes. Empty if tags are not installed."""

    model_config = pydantic.ConfigDict(
        json_schema_extra={"examples": [{"languages": ["en", "ar", "de"]}]}
    )

    languages: list[str]


class Problem(pydantic.BaseModel):
    """The reason why a request failed."""

    model_config = pydantic.ConfigDict(
        json_schema_extra={"examples": [{"detail": "a search needs a text, a photo or an id"}]}
    )

    detail: str


PROBLEMS = {
    code: {"model": Problem, "description": text}
    for code, text in {
        404: "There is no such photo, or tags are not installed.",
        413: "The request is too large.",
        422: "A parameter is not valid.",
        429: "Too many requests at a time from this client.",
        503: "Too many requests at a time.",
    }.items()
}
ID = r"^[0-9a-f]{20}$"
Text = Annotated[str, pydantic.StringConstraints(max_length=LONGEST)]
Texts = Annotated[list[Text], pydantic.Field(max_length=MOST_TEXTS)]
Id = Annotated[str, Path(pattern=ID, examples=[EXAMPLE["id"]])]
QUERY = {
    "description": "What photos should show, in any language.",
    "examples": ["ein Hund am Meer"],
}
NOT = {"alias": "not", "description": "What photos should not show.", "examples": [["people"]]}
COUNT = {"ge": 1, "le": MOST_HITS, "description": "The largest number of photos."}
CUTOFF = {
    "ge": 0,
    "le": 1,
    "description": "Photos with a lower percentile are left out.",
    "examples": [0.05],
}
LANGUAGE = {
    "pattern": r"^[a-z]{2,3}$",
    "description": "The language of the tags, one of those that /api/languages lists.",
    "examples": ["de"],
}
TAG_COUNT = {"ge": 1, "le": MOST_HITS, "description": "The largest number of tags."}
TAG_CUTOFF = CUTOFF | {"description": "Tags with a lower percentile are left out."}
WHERE = {
    "description": "A filter: which photos to consider.",
    "examples": ["folder greece and taken 2021..2023-06"],
}
