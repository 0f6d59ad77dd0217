import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from PIL import Image

from worker.gradcam.decode import claimed, decode

Pixels = NDArray[np.uint8]

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
ORIENTATION_TAG = 0x112
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {  # EXIF orientation -> what sets the picture upright
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png16(values: NDArray[np.uint16], color_type: int, transparent: bytes = b"") -> bytes:
    """A 16-bit PNG of (height, width, channels), written by hand: Pillow writes grey ones only."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)),
            chunk(b"tRNS", transparent) if transparent else b"",
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        )
    )


@pytest.fixture
def stored() -> Pixels:
    """16 high, 32 wide: red, green, blue and white quarters, so that no turn of it looks like another."""
    above = np.hstack([np.full((8, 16, 3), color, np.uint8) for color in (RED, GREEN)])
    below = np.hstack([np.full((8, 16, 3), color, np.uint8) for color in (BLUE, WHITE)])
    return np.vstack([above, below])


class TestFormats:
    @pytest.mark.parametrize(
        ("kind", "options", "media_type"),
        [
            ("JPEG", {"quality": 95, "subsampling": 0}, "image/jpeg"),
            ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}, "image/jpeg"),
            ("MPO", {"quality": 95, "subsampling": 0, "save_all": True}, "image/jpeg"),
            ("PNG", {}, "image/png"),
            ("WEBP", {"lossless": True}, "image/webp"),
            ("WEBP", {"quality": 100}, "image/webp"),
            ("GIF", {}, "image/gif"),
            ("BMP", {}, "image/bmp"),
        ],
    )
    def test_every_format_becomes_rgb(
        self, kind: str, options: dict[str, Any], media_type: str, stored: Pixels
    ) -> None:
        more = {"append_images": [Image.new("RGB", (32, 16))]} if kind == "MPO" else {}
        decoded = decode(encode(Image.fromarray(stored), kind, **options, **more))
        assert decoded.media_type == media_type
        assert decoded.pixels.dtype == np.uint8
        middles = decoded.pixels[4::8, 8::16]  # lossy formats blur the edges
        assert_allclose(middles, stored[4::8, 8::16], atol=0 if kind in {"PNG", "GIF", "BMP"} else 4)
        assert decoded.pixels.shape == (16, 32, 3)

    def test_cmyk_becomes_rgb(self, stored: Pixels) -> None:
        cmyk = Image.fromarray(stored).convert("CMYK")
        decoded = decode(encode(cmyk, "JPEG", quality=95, subsampling=0))
        assert_allclose(decoded.pixels[4::8, 8::16], stored[4::8, 8::16], atol=4)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
    def test_grey_becomes_three_equal_channels(self, kind: str) -> None:
        grey = Image.new("L", (16, 8), 77)
        assert_array_equal(decode(encode(grey, kind)).pixels, np.full((8, 16, 3), 77))

    @pytest.mark.parametrize("mode", ["1", "P"])
    def test_a_palette_and_black_and_white_become_rgb(self, mode: str) -> None:
        pixels = np.zeros((4, 6, 3), np.uint8)
        pixels[:, :2] = 255
        assert_array_equal(decode(encode(Image.fromarray(pixels).convert(mode), "PNG")).pixels, pixels)

    def test_a_gif_of_one_color_is_as_good_as_any(self) -> None:
        picture = Image.new("P", (1000, 1000), 5)
        picture.putpalette([9] * 15 + [*RED])
        assert_array_equal(decode(encode(picture, "GIF")).pixels, np.full((1000, 1000, 3), RED))

    def test_sixteen_bits_become_eight(self) -> None:
        values = np.arange(0, 256, 15, dtype=np.uint16).reshape(3, 6, 1) * 257
        eight = (values // 257).astype(np.uint8)
        assert_array_equal(decode(png16(values, 0)).pixels, np.repeat(eight, 3, axis=2))
        colors = np.concatenate([values, values[::-1], values[:, ::-1]], axis=2)
        assert_array_equal(decode(png16(colors, 2)).pixels, (colors // 257).astype(np.uint8))

    @pytest.mark.parametrize("name", ["astronaut", "camera", "chelsea", "coffee", "rocket"])
    def test_a_photo_looks_as_it_does_to_another_decoder(self, name: str, photos: Path) -> None:
        path = photos / f"{name}.jpg"
        with Image.open(path) as photo:
            other = np.asarray(photo.convert("RGB"), np.int16)
        assert abs(decode(path.read_bytes()).pixels - other).mean() < 1


class TestUpright:
    @pytest.mark.parametrize("orientation", UPRIGHT)
    @pytest.mark.parametrize(
        ("kind", "mode"),
        [("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGBA")],
    )
    def test_a_picture_is_turned_as_its_exif_says(
        self, kind: str, mode: str, orientation: int, stored: Pixels
    ) -> None:
        picture, exif = Image.fromarray(stored).convert(mode), Image.Exif()
        if mode == "RGBA":  # one corner is transparent: an alpha that is nowhere needed may be left out
            picture.putpixel((31, 15), (0, 0, 0, 0))
        exif[ORIENTATION_TAG] = orientation
        options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
        decoded = decode(encode(picture, kind, exif=exif, **options))
        assert_allclose(decoded.pixels, UPRIGHT[orientation](stored), atol=3)

    def test_exif_that_stands_behind_the_pixels_counts_as_well(self, stored: Pixels) -> None:
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = 6
        for mode in ("RGB", "RGBA"):
            picture = Image.fromarray(stored).convert(mode)
            if mode == "RGBA":
                picture.putpixel((31, 15), (0, 0, 0, 0))
            data = encode(picture, "PNG", exif=exif)
            at = data.index(b"eXIf") - 4
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            moved = data[:at] + data[end:-12] + data[at:end] + data[-12:]
            assert_allclose(decode(moved).pixels, UPRIGHT[6](stored), atol=3)

    @pytest.mark.parametrize("orientation", [0, 9, 65535])
    def test_an_orientation_that_does_not_exist_turns_nothing(self, orientation: int, stored: Pixels) -> None:
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = orientation
        assert_array_equal(decode(encode(Image.fromarray(stored), "PNG", exif=exif)).pixels, stored)


class TestAlphaOnWhite:
    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_half_of_a_color_is_mixed_with_white(self, kind: str) -> None:
        data = encode(Image.new("RGBA", (4, 4), (200, 100, 0, 51)), kind, lossless=True)
        assert_allclose(decode(data).pixels, np.broadcast_to([244, 224, 204], (4, 4, 3)), atol=1)

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
    def test_what_is_transparent_is_white_whatever_color_lies_below(self, kind: str) -> None:
        picture = Image.new("RGBA", (4, 2), (*RED, 255))
        picture.paste((*GREEN, 0), (2, 0, 4, 2))
        pixels = decode(encode(picture, kind, lossless=True)).pixels
        assert pixels[0].tolist() == [[*RED], [*RED], [*WHITE], [*WHITE]]

    def test_grey_with_alpha_is_mixed_with_white(self) -> None:
        data = encode(Image.new("LA", (2, 2), (100, 51)), "PNG")
        assert_allclose(decode(data).pixels, np.full((2, 2, 3), 224), atol=1)

    @pytest.mark.parametrize("transparency", [1, b"\xff\x00\xff"])
    def test_a_transparent_color_of_a_palette_is_white(self, transparency: int | bytes) -> None:
        picture = Image.new("P", (3, 1))
        picture.putpalette([*RED, *GREEN, *BLUE])
        picture.putdata([0, 1, 2])
        pixels = decode(encode(picture, "PNG", transparency=transparency)).pixels
        assert pixels[0].tolist() == [[*RED], [*WHITE], [*BLUE]]

    @pytest.mark.parametrize(
        ("mode", "colors", "transparent"), [("L", (9, 90), 90), ("RGB", (RED, GREEN), GREEN)]
    )
    def test_a_single_transparent_color_is_white(self, mode: str, colors: Any, transparent: Any) -> None:
        picture = Image.new(mode, (2, 1))
        picture.putdata(colors)
        pixels = decode(encode(picture, "PNG", transparency=transparent)).pixels
        assert pixels[0, 1].tolist() == [*WHITE]
        assert pixels[0, 0].tolist() == ([9, 9, 9] if mode == "L" else [*RED])

    @pytest.mark.parametrize(("color_type", "channels"), [(4, 1), (6, 3)])
    def test_sixteen_bits_with_alpha_are_mixed_with_white(self, color_type: int, channels: int) -> None:
        values = np.full((2, 2, channels + 1), 100 * 257, np.uint16)
        values[..., -1] = 51 * 257
        assert_allclose(decode(png16(values, color_type)).pixels, np.full((2, 2, 3), 224), atol=1)

    @pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3)])
    def test_a_single_transparent_color_of_sixteen_bits_is_white(
        self, color_type: int, channels: int
    ) -> None:
        values = np.full((1, 2, channels), 100 * 257, np.uint16)
        values[0, 1] = 40_000  # not twice the same byte
        pixels = decode(png16(values, color_type, struct.pack(">H", 40_000) * channels)).pixels
        assert pixels[0].tolist() == [[100, 100, 100], [*WHITE]]


class TestClaimed:
    """How much room a picture takes is known before it is decoded."""

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
    def test_it_is_what_comes_out(self, kind: str, stored: Pixels) -> None:
        data = encode(Image.fromarray(stored), kind)
        assert claimed(data) == 16 * 32 == decode(data).pixels.size / 3

    def test_it_is_the_same_whichever_way_is_up(self, stored: Pixels) -> None:
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = 6
        data = encode(Image.fromarray(stored), "JPEG", exif=exif)
        assert claimed(data) == decode(data).pixels.size / 3


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA")])
def test_a_tall_translucent_picture_is_whole_although_it_is_laid_on_white_in_parts(
    kind: str, mode: str, orientation: int
) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (601, 5, 4), dtype=np.uint8)
    picture, exif = Image.fromarray(noise).convert(mode), Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    rgba = np.asarray(picture.convert("RGBA"), np.float64)
    alpha = rgba[..., 3:] / 255
    white = UPRIGHT[orientation](np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8))
    expected = white.astype(np.int16)  # so that differences may be negative
    decoded = decode(encode(picture, kind, exif=exif, lossless=True, exact=True))
    assert_allclose(decoded.pixels, expected, atol=1)
    assert decoded.pixels.flags.c_contiguous


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize("alpha", [255, 0])
def test_an_animation_is_its_first_frame(kind: str, alpha: int) -> None:
    first, second = Image.new("RGBA", (4, 2), (*RED, 255)), Image.new("RGBA", (4, 2), (*BLUE, 255))
    first.putpixel((3, 1), (*GREEN, alpha))
    more = {"save_all": True, "append_images": [second], "lossless": True}
    expected = np.full((2, 4, 3), RED, np.uint8)
    expected[1, 3] = GREEN if alpha else WHITE
    assert_array_equal(decode(encode(first, kind, **more)).pixels, expected)
