"""Images in requests: what data URLs hold, decoded within limits.

Nothing is fetched for a client, and no file is read. A small body can unpack to any amount of
memory and work, so the limits hold for all images of a request and are checked on their headers,
before a pixel of any is decoded; and what is made of them is counted while requests wait (`Room`).
"""

from __future__ import annotations

import base64
import io
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from moepress.serve.schema import RefusedError

HEAD = "data:image/"
# Those of OpenAI. PIL reads dozens of formats more, some with other programs (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MOST_IMAGES = 100
MOST_PIXELS = 64 << 20  # 200 MB as RGB
MOST_RATIO = 200  # of the sides: a processor that enlarges the shorter side enlarges the other too
MOST_SCANS = 32  # of a JPEG with `MOST_PIXELS`, of a smaller one more: each goes over all pixels
MOST_EXIF = 16  # segments of a JPEG: PIL joins them in time that grows with their square


class Room:
    """Memory for what processors make of images, of all requests that are not done.

    An image of some kB is some 100 MB of patches, and hundreds of requests may wait.

    Args:
        most: bytes. One request alone may exceed them.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self._lock = threading.RLock()  # `_free` may run at any allocation, also inside `take`

    def take(self, size: int, user: object) -> None:
        """Take bytes until `user` is gone.

        Raises:
            RefusedError: there is no room.
        """
        with self._lock:
            if self.taken and self.taken + size > self.most:
                raise RefusedError(None, "Too many images wait: try again", status=429)
            self.taken += size
        weakref.finalize(user, self._free, size)

    def _free(self, size: int) -> None:
        with self._lock:
            self.taken -= size


def decoded(urls: Sequence[str]) -> list[Any]:
    """The images (PIL, RGB) of data URLs.

    Raises:
        RefusedError: one is no data URL or no image of `FORMATS`, or they exceed a limit.
    """
    if len(urls) > MOST_IMAGES:
        raise _refused(f"expected at most {MOST_IMAGES} images in a request", len(urls))
    opened = []
    pixels = work = 0
    for url in urls:
        data = _data(url)
        image = _opened(data)
        size = image.width * image.height
        if max(image.size) > MOST_RATIO * min(image.size):
            raise _refused(
                f"expected sides of at most {MOST_RATIO} to 1",
                f"{image.width} x {image.height} pixels",
            )
        pixels += size
        work += size * _scans(data)
        opened.append(image)
    if pixels > MOST_PIXELS:
        raise _refused(f"expected at most {MOST_PIXELS} pixels in all images of a request", pixels)
    if work > MOST_PIXELS * MOST_SCANS:
        raise _refused("a JPEG has more scans than images of its size need")
    return [_converted(image) for image in opened]


def _data(url: str) -> bytes:
    head, _, data = url.partition(",")
    if not head.startswith(HEAD) or not head.endswith(";base64"):
        raise _refused("expected data:image/TYPE;base64,DATA", url[:40])
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise _refused("the data are not base64") from error


def _opened(data: bytes) -> Any:
    """An image of which the header is read."""
    from PIL import Image

    if data.count(b"Exif\0\0") > MOST_EXIF:
        raise _refused(f"expected at most {MOST_EXIF} Exif segments")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # PIL's readers raise what they come upon: SyntaxError, struct.error
        raise _unreadable() from error


def _converted(image: Any) -> Any:
    """An image as RGB, turned as its camera says."""
    from PIL import ImageOps

    try:
        with image:
            made = image.convert("RGB")
    except Exception as error:
        raise _unreadable() from error
    with suppress(Exception):  # damaged Exif data: PIL raises what it comes upon
        ImageOps.exif_transpose(made, in_place=True)  # as transformers does
    return made


def _scans(data: bytes) -> int:
    """Times that decoding an image goes over its pixels."""
    return data.count(b"\xff\xda") if data.startswith(b"\xff\xd8") else 1


def _unreadable() -> RefusedError:
    return _refused(f"the data are no image that can be read. Expected {', '.join(FORMATS)}")


def _refused(message: str, value: Any = None) -> RefusedError:
    return RefusedError("messages", f"image_url: {message}", value)
