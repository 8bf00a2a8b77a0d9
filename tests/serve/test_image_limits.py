"""Small requests do not unpack to much memory or work, and no data is a failure of the server."""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import pytest
from transformers.image_utils import load_image

from tests.serve.conftest import Here  # noqa: F401  # skips without the server's libraries

Image = pytest.importorskip("PIL.Image")
from moepress.serve.images import MOST_IMAGES, MOST_PIXELS, Room, decoded  # noqa: E402
from moepress.serve.schema import RefusedError  # noqa: E402

ORIENTATION = 0x0112  # of Exif


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def saved(width: int, height: int, kind: str = "png", mode: str = "1", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)


def refused(urls: list[str], match: str) -> None:
    with pytest.raises(RefusedError, match=match) as error:
        decoded(urls)
    assert (error.value.param, error.value.status) == ("messages", 400)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_images_of_openais_formats_are_read(kind: str) -> None:
    (image,) = decoded([url(saved(5, 7, kind, "L"), kind)])
    assert (image.size, image.mode) == ((5, 7), "RGB") and max(
        map(max, image.get_flattened_data())
    ) < 9


@pytest.mark.parametrize("turned", range(1, 9))
def test_images_are_turned_as_transformers_does(turned: int) -> None:
    """A camera writes the picture as its sensor lies, and how it was held."""
    exif = Image.Exif()
    exif[ORIENTATION] = turned
    file = io.BytesIO()
    image = Image.new("RGB", (32, 16))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    image.save(file, "jpeg", exif=exif)
    data = url(file.getvalue(), "jpeg")
    (found,) = decoded([data])
    expected = load_image(data)
    assert found.size == expected.size == ((32, 16) if turned < 5 else (16, 32))
    assert found.tobytes() == expected.tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"", b"x", b"MM\0*" + b"\xff" * 40, b"II*\0\x08\0\0\0\1\0\x12\1"])
def test_damaged_exif_data_turn_nothing(exif: bytes) -> None:
    data = saved(4, 2, "jpeg", "L", exif=b"Exif\0\0" + exif)
    (found,) = decoded([url(data, "jpeg")])
    assert found.size == (4, 2)


@pytest.mark.parametrize("kind", ["eps", "bmp", "tiff", "ppm", "ico", "tga", "pcx", "jpeg2000"])
def test_other_formats_are_not_opened(kind: str) -> None:
    data = saved(32, 32, kind, "RGB")
    refused([url(data)], "Expected PNG, JPEG, WEBP, GIF")


def test_pixels_count_over_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    large = url(saved(8192, 8192))  # 8 kB, and within the limit alone
    assert len(large) < 20_000 and MOST_PIXELS == 8192 * 8192
    refused([large] * 2, f"at most {MOST_PIXELS} pixels in all")
    refused([url(saved(8193, 8192))], f"at most {MOST_PIXELS} pixels in all")
    refused([url(saved(1, 1))] * (MOST_IMAGES + 1), f"at most {MOST_IMAGES} images")


def test_as_many_as_allowed_are_read() -> None:
    assert len(decoded([url(saved(3, 2))] * MOST_IMAGES)) == MOST_IMAGES


def test_long_strips_are_refused() -> None:
    """A processor scales the shorter side to some hundred pixels, and the other with it."""
    for size in ((1, 201), (4000, 19)):
        refused([url(saved(*size))], "sides of at most 200 to 1. Got")
    assert decoded([url(saved(1, 200))])[0].size == (1, 200)


def test_scans_of_a_jpeg_are_limited() -> None:
    """Each goes over all pixels, and takes some hundred bytes."""
    data = saved(4096, 4096, "jpeg", "L", progressive=True)
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    assert len(decoded([url(data)])) == 1
    refused([url(data[:at] + scan * 1000 + b"\xff\xd9")], "more scans than images of its size need")


def test_exif_segments_of_a_jpeg_are_limited() -> None:
    data = saved(8, 8, "jpeg", "L")
    segment = b"\xff\xe1" + (18).to_bytes(2) + b"Exif\0\0" + bytes(10)
    refused([url(data[:2] + segment * 1000 + data[2:])], "at most 16 Exif segments")


def test_damaged_images_are_the_clients() -> None:
    data = saved(64, 64, "png", "RGB")
    at = data.index(b"IDAT") - 4
    pixels = zlib.compress(bytes(64 * (1 + 64 * 3)))
    broken = b"\0\0\0\x05I\x01\xffT" + bytes(9)
    named = data[:at] + chunk(b"IDAT", pixels[:20]) + broken + chunk(b"IEND", b"")
    for wrong in (named, data[: at + 30], data[:30], b"", b"GIF89a", b"\xff\xd8\xff\xe1"):
        refused([url(wrong)], "no image that can be read")
    for kind in ("png", "jpeg", "webp", "gif"):
        whole = saved(40, 40, kind, "L")
        for place in range(0, len(whole), 7):
            damaged = whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
            try:
                decoded([url(damaged)])
            except RefusedError as error:
                assert error.status == 400


def test_images_that_wait_have_room_until_their_requests_are_done() -> None:
    class User:
        pass

    room, first, second = Room(10), User(), User()
    room.take(20, first)  # alone
    with pytest.raises(RefusedError, match="try again") as error:
        room.take(1, second)
    assert error.value.status == 429
    del first
    room.take(4, second)
    room.take(6, User())
    room.take(6, second)
    assert room.taken == 10
    with pytest.raises(RefusedError):
        room.take(1, second)
