"""The photos on a page. Each is stored once, as a rule of the page's style, and shown by its class.

The page then needs neither files beside it nor a script to show them.
"""

import base64
import io
import logging
import os

from PIL import Image

from input_pipeline import images as image_io
from input_pipeline import photo_limits
from xlir.report.markup import Markup, tag

log = logging.getLogger(__name__)

# Pixels of a photo's longer side, and its quality as JPEG.
SIZE, QUALITY = 180, 72
# The largest size of all photos together, in bytes of base64.
MOST_BYTES = 12_000_000


class Pictures:
    """Collects the photos of a page.

    Attributes:
      left_out: the number of different photos for which there was no room.
    """

    def __init__(self):
        self._names: dict[tuple[str, int], str] = {}
        self._rules: list[str] = []
        self._bytes = self.left_out = 0

    def show(
        self, key: tuple[str, int], photo: bytes | str | os.PathLike, label: str, note: str = ""
    ) -> Markup:
        """A photo as an element, an empty one if it can't be read or there is no room for it.

        Args:
          key: identifies the photo: the name of its set, and its row.
          photo: the encoded photo, or its path.
          label: what it shows, for screen readers.
          note: a short text below it.
        """
        if key not in self._names:
            self._names[key] = self._add(photo)
        kind = f"photo {self._names[key]}".rstrip()
        square = tag("span", class_=kind, role="img", aria_label=label, title=label)
        return tag("span", square, tag("small", note), class_="tile") if note else square

    def style(self) -> str:
        """The rules of all photos, as CSS."""
        return "\n".join(self._rules)

    def _add(self, photo: bytes | str | os.PathLike) -> str:
        """Stores a photo; returns its class, or an empty text."""
        try:
            data = photo if isinstance(photo, bytes) else photo_limits.read(photo)
            pixels = image_io.preview(data, SIZE)
        except (OSError, ValueError) as error:
            log.warning("a photo is left out of the report: %s", error)
            return ""
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
        encoded = base64.b64encode(buffer.getvalue()).decode()
        if self._bytes + len(encoded) > MOST_BYTES:
            self.left_out += 1
            return ""
        self._bytes += len(encoded)
        name = f"p{len(self._rules)}"
        self._rules.append(f'.{name}{{background-image:url("data:image/jpeg;base64,{encoded}")}}')
        return name
