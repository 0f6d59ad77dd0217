import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin

from gradcam_worker.errors import UnsupportedMediaType
from gradcam_worker.gradcam.decoding.decode import decode, read_structure
from gradcam_worker.gradcam.decoding.structure import Damage

Pixels = NDArray[np.uint8]

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
ORIENTATION_TAG = 0x112
TO_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {  # EXIF orientation -> what makes the image upright
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, 1),
}


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png16(values: NDArray[np.uint16], color_type: int, transparent: bytes = b"") -> bytes:
    """A 16-bit PNG of (height, width, channels), written by hand: Pillow writes only grey ones."""
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


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def exif_of(order: str, *entries: tuple[int, int, int, int]) -> bytes:
    """EXIF with these entries (tag, type, count, value)."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    body = b"".join(
        struct.pack(f"{order}HHI", *entry[:3])
        + struct.pack(order + {1: "B", 3: "H", 4: "I"}[entry[1]], entry[3]).ljust(4, b"\0")
        for entry in entries
    )
    return b"Exif\0\0" + head + struct.pack(f"{order}IH", 8, len(entries)) + body + bytes(4)


@pytest.fixture
def quarters() -> Pixels:
    """16 high, 32 wide: red, green, blue and white quarters, so that all orientations differ."""
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
        self, kind: str, options: dict[str, Any], media_type: str, quarters: Pixels
    ) -> None:
        save_options = {"append_images": [Image.new("RGB", (32, 16))]} if kind == "MPO" else {}
        decoded = decode(encode(Image.fromarray(quarters), kind, **options, **save_options))
        assert decoded.media_type == media_type
        assert decoded.pixels.dtype == np.uint8
        middles = decoded.pixels[4::8, 8::16]  # lossy formats blur the edges
        assert_allclose(middles, quarters[4::8, 8::16], atol=0 if kind in {"PNG", "GIF", "BMP"} else 4)
        assert decoded.pixels.shape == (16, 32, 3)

    def test_cmyk_becomes_rgb(self, quarters: Pixels) -> None:
        cmyk = Image.fromarray(quarters).convert("CMYK")
        decoded = decode(encode(cmyk, "JPEG", quality=95, subsampling=0))
        assert_allclose(decoded.pixels[4::8, 8::16], quarters[4::8, 8::16], atol=4)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
    def test_grey_becomes_three_equal_channels(self, kind: str) -> None:
        grey = Image.new("L", (16, 8), 77)
        assert_array_equal(decode(encode(grey, kind)).pixels, np.full((8, 16, 3), 77))

    @pytest.mark.parametrize("mode", ["1", "P"])
    def test_a_palette_and_black_and_white_become_rgb(self, mode: str) -> None:
        pixels = np.zeros((4, 6, 3), np.uint8)
        pixels[:, :2] = 255
        assert_array_equal(decode(encode(Image.fromarray(pixels).convert(mode), "PNG")).pixels, pixels)

    def test_a_gif_of_one_color_is_decoded(self) -> None:
        image = Image.new("P", (1000, 1000), 5)
        image.putpalette([9] * 15 + [*RED])
        assert_array_equal(decode(encode(image, "GIF")).pixels, np.full((1000, 1000, 3), RED))

    def test_sixteen_bits_become_eight(self) -> None:
        values = np.arange(0, 256, 15, dtype=np.uint16).reshape(3, 6, 1) * 257
        eight = (values // 257).astype(np.uint8)
        assert_array_equal(decode(png16(values, 0)).pixels, np.repeat(eight, 3, axis=2))
        colors = np.concatenate([values, values[::-1], values[:, ::-1]], axis=2)
        assert_array_equal(decode(png16(colors, 2)).pixels, (colors // 257).astype(np.uint8))

    @pytest.mark.parametrize("name", ["astronaut", "camera", "chelsea", "coffee", "rocket"])
    def test_a_photo_has_the_pixels_that_pillow_decodes(self, name: str, photos: Path) -> None:
        path = photos / f"{name}.jpg"
        with Image.open(path) as photo:
            rgb = photo.convert("RGB")
            if profile := photo.info.get("icc_profile"):  # rocket: Adobe RGB
                source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
                ImageCms.profileToProfile(rgb, source, ImageCms.createProfile("sRGB"), inPlace=True)
            expected = np.asarray(rgb, np.int16)
        assert abs(decode(path.read_bytes()).pixels - expected).mean() < 1


class TestUpright:
    @pytest.mark.parametrize("orientation", TO_UPRIGHT)
    @pytest.mark.parametrize(
        ("kind", "mode"),
        [("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGBA")],
    )
    def test_an_image_is_made_upright_by_its_exif(
        self, kind: str, mode: str, orientation: int, quarters: Pixels
    ) -> None:
        image, exif = Image.fromarray(quarters).convert(mode), Image.Exif()
        if mode == "RGBA":  # one corner is transparent: encoders may drop an opaque alpha
            image.putpixel((31, 15), (0, 0, 0, 0))
        exif[ORIENTATION_TAG] = orientation
        options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
        decoded = decode(encode(image, kind, exif=exif, **options))
        assert_allclose(decoded.pixels, TO_UPRIGHT[orientation](quarters), atol=3)

    def test_exif_after_the_pixels_counts_as_well(self, quarters: Pixels) -> None:
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = 6
        for mode in ("RGB", "RGBA"):
            image = Image.fromarray(quarters).convert(mode)
            if mode == "RGBA":
                image.putpixel((31, 15), (0, 0, 0, 0))
            data = encode(image, "PNG", exif=exif)
            at = data.index(b"eXIf") - 4
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            moved = data[:at] + data[end:-12] + data[at:end] + data[-12:]
            assert_allclose(decode(moved).pixels, TO_UPRIGHT[6](quarters), atol=3)

    @pytest.mark.parametrize("orientation", [0, 9, 65535])
    def test_an_invalid_orientation_is_ignored(self, orientation: int, quarters: Pixels) -> None:
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = orientation
        assert_array_equal(decode(encode(Image.fromarray(quarters), "PNG", exif=exif)).pixels, quarters)


class TestExifOrientation:
    """Opaque or translucent, JPEG, PNG or WebP: the rule of browsers."""

    KINDS = (
        ("JPEG", "RGB"),
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("WEBP", "RGB"),
        ("WEBP", "RGBA"),
    )

    def shape(self, kind: str, mode: str, exif: bytes, **save_options: Any) -> tuple[int, ...]:
        """The shape of a decoded image that is stored 6 wide and 4 high."""
        image = Image.new("RGBA", (6, 4), RED)
        image.putpixel((0, 0), (0, 0, 0, 0))
        return decode(encode(image.convert(mode), kind, exif=exif, **save_options)).pixels.shape

    @pytest.mark.parametrize(("kind", "mode"), KINDS)
    @pytest.mark.parametrize("order", ["<", ">"])
    def test_orientation_6_rotates_every_format(self, kind: str, mode: str, order: str) -> None:
        assert self.shape(kind, mode, exif_of(order, (ORIENTATION_TAG, 3, 1, 6))) == (6, 4, 3)

    @pytest.mark.parametrize(("kind", "mode"), KINDS)
    @pytest.mark.parametrize(
        "exif",
        [
            b"garbage!",
            b"Exif\0\0",
            b"Exif\0\0II*\0\xff\xff\xff\xff",
            b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
            *(
                exif
                for order in "<>"
                for exif in (
                    exif_of(order, (ORIENTATION_TAG, 4, 1, 6)),
                    exif_of(order, (ORIENTATION_TAG, 1, 1, 6)),
                    exif_of(order, (ORIENTATION_TAG, 3, 2, 6)),
                    exif_of(order, (ORIENTATION_TAG, 3, 1, 9)),
                    exif_of(order, (ORIENTATION_TAG, 3, 1, 1), (ORIENTATION_TAG, 3, 1, 6)),
                )
            ),
        ],
    )
    def test_anything_but_a_single_short_from_1_to_8_is_ignored(
        self, kind: str, mode: str, exif: bytes
    ) -> None:
        assert self.shape(kind, mode, exif) == (4, 6, 3)

    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_xmp_and_text_are_ignored(self, mode: str) -> None:
        xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode())
        text.add_text(
            "Raw profile type exif", "\nexif\n 34\n" + exif_of("<", (ORIENTATION_TAG, 3, 1, 6)).hex()
        )
        entry = exif_of("<", (ORIENTATION_TAG, 3, 1, 1))
        assert self.shape("PNG", mode, entry, pnginfo=text) == (4, 6, 3)
        assert self.shape("WEBP", mode, entry, xmp=xmp) == (4, 6, 3)
        assert self.shape("JPEG", "RGB", entry, xmp=xmp) == (4, 6, 3)


class TestMetadata:
    """Metadata cannot make an image fail, change it, take memory, or appear on standard error."""

    FORGED = b'x\n{"level":"critical","message":"ledger wiped"}\n\x1b[31mRED'
    LARGE = zlib.compress(bytes(20_000_000))
    CHUNKS: ClassVar[dict[str, bytes]] = {
        "a profile of 20 MB": chunk(b"iCCP", b"x\0\0" + LARGE),
        "a profile that is no zlib": chunk(b"iCCP", b"x\0\0not zlib"),
        "a profile of another color space": chunk(b"iCCP", FORGED + b"\0\0" + zlib.compress(bytes(200))),
        "a text of 20 MB": chunk(b"iTXt", b"a\0\1\0\0\0" + LARGE),
        "a packed text": chunk(b"zTXt", b"a\0\0" + LARGE),
        "a text with a wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"?",
        "a short pHYs": chunk(b"pHYs", b"\0\0\1"),
        "a short gAMA": chunk(b"gAMA", b"\0"),
        "a short cHRM": chunk(b"cHRM", b"\0\0\0"),
        "an empty sRGB": chunk(b"sRGB", b""),
        "an sBIT of too many": chunk(b"sBIT", bytes(9)),
        "a bKGD": chunk(b"bKGD", bytes(1)),
        "a tIME": chunk(b"tIME", b"now"),
        "invalid EXIF": chunk(b"eXIf", FORGED),
        "an unknown chunk": chunk(b"\x1b[3A", FORGED),
        "the frames of an animation": chunk(b"acTL", b"\0") + chunk(b"fcTL", b"\0") + chunk(b"fdAT", b"\0"),
        "a palette that is not needed": chunk(b"PLTE", bytes(7)),
    }

    @pytest.mark.parametrize("name", CHUNKS)
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
    @pytest.mark.parametrize("position", ["before", "after"])
    def test_a_png_has_the_same_pixels_with_it(
        self, name: str, mode: str, position: str, quarters: Pixels, capfd: pytest.CaptureFixture[str]
    ) -> None:
        data = encode(Image.fromarray(quarters).convert(mode), "PNG")
        at = 33 if position == "before" else len(data) - 12
        decoded = decode(data[:at] + self.CHUNKS[name] + data[at:])
        assert_array_equal(decoded.pixels, decode(data).pixels)
        assert decoded.damage is None
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        "segment",
        [
            b"\xff\xee\0\x09Adobe\0\x64",  # Adobe, too short
            b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x09",  # an unknown transform
            b"\xff\xe0\0\x08JFIF\0\1",
            b"\xff\xe0\0\x10JFIF\0\x09\x09\0\0\1\0\1\0\0",  # version 9
            b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\xff\xff",  # a missing thumbnail
            b"\xff\xe1\0\x10Exif\0\0garbage!",
            b"\xff\xe2\0\x10ICC_PROFILE\0\x09\x03",
            b"\xff\xed\0\x10Photoshop 3.0\0",
            b"\xff\xfe\0\x04\x1b[",
            b"\xff\xf0\0\x02",
            bytes(40),
        ],
    )
    def test_a_jpeg_has_the_same_pixels_with_it(
        self, segment: bytes, quarters: Pixels, capfd: pytest.CaptureFixture[str]
    ) -> None:
        data = encode(Image.fromarray(quarters), "JPEG")
        for at in (2, data.index(b"\xff\xdb"))[not any(segment) :]:  # zeros would not look like a JPEG
            decoded = decode(data[:at] + segment + data[at:])
            assert_array_equal(decoded.pixels, decode(data).pixels)
            assert decoded.damage is None
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_a_webp_has_the_same_pixels_with_it(self, mode: str, quarters: Pixels) -> None:
        image = Image.fromarray(quarters).convert(mode)
        image.putpixel((0, 0), (1, 2, 3, 0) if mode == "RGBA" else (1, 2, 3))
        data = encode(image, "WEBP", lossless=True, exif=b"garbage!", xmp=b"<", icc_profile=self.FORGED)
        assert_array_equal(decode(data).pixels, decode(encode(image, "WEBP", lossless=True)).pixels)

    def test_only_a_valid_transparent_color_counts(self) -> None:
        data = encode(Image.new("RGB", (3, 2), RED), "PNG")
        for color, expected in ((RED, WHITE), (GREEN, RED)):
            transparency = chunk(b"tRNS", struct.pack(">HHH", *color))
            assert decode(data[:33] + transparency + data[33:]).pixels[0, 0].tolist() == [*expected]
        for malformed in (chunk(b"tRNS", b"\0\xff"), chunk(b"tRNS", bytes(300))):
            decoded = decode(data[:33] + malformed + data[33:])
            assert (decoded.pixels[0, 0].tolist(), decoded.damage) == ([*RED], None)
        broken = chunk(b"tRNS", struct.pack(">HHH", *RED))[:-1] + b"?"
        assert decode(data[:33] + broken + data[33:]).damage == Damage(0, "its transparency is damaged")


class TestUncommonBmp:
    MASKS: ClassVar[dict[str, tuple[int, tuple[int, ...]]]] = {
        "rgbx": (32, (0xFF, 0xFF00, 0xFF0000)),
        "bgrx": (32, (0xFF0000, 0xFF00, 0xFF)),
        "xrgb": (32, (0xFF00, 0xFF0000, 0xFF000000)),
        "ten bits": (32, (0x3FF00000, 0xFFC00, 0x3FF)),
        "565": (16, (0xF800, 0x7E0, 0x1F)),
        "555": (16, (0x7C00, 0x3E0, 0x1F)),
        "rgba": (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
    }

    @staticmethod
    def bmp(bits: int, masks: tuple[int, ...], values: NDArray[np.uint32]) -> bytes:
        height, width = values.shape
        head = 56 if len(masks) == 4 else 40
        rows = values.astype(f"<u{bits // 8}")
        rows = np.pad(rows, ((0, 0), (0, width % 2 if bits == 16 else 0)))[::-1]
        info = struct.pack("<IiiHHIIiiII", head, width, height, 1, bits, 3, rows.nbytes, 0, 0, 0, 0)
        body = info + struct.pack(f"<{len(masks)}I", *masks)
        return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + len(body)) + body + rows.tobytes()

    @pytest.mark.parametrize("name", MASKS)
    def test_each_channel_is_read_by_its_mask(self, name: str, quarters: Pixels) -> None:
        bits, masks = self.MASKS[name]
        part = quarters[:, :31]
        values = np.zeros(part.shape[:2], np.uint32)
        for channel, mask in enumerate(masks[:3]):
            values |= np.where(part[..., channel], mask, 0).astype(np.uint32)
        expected = part.copy()
        if len(masks) == 4:
            values |= np.uint32(masks[3])
            values[0, 0] = masks[0]  # transparent red
            expected[0, 0] = 255
        assert_array_equal(decode(self.bmp(bits, masks, values)).pixels, expected)

    def test_alpha_that_is_zero_everywhere_is_ignored(self) -> None:
        values = np.full((2, 3), 0x0000FF, np.uint32)
        assert_array_equal(
            decode(self.bmp(32, self.MASKS["rgba"][1], values)).pixels, np.full((2, 3, 3), RED)
        )

    @pytest.mark.parametrize(("bits", "compression"), [(2, 0), (64, 0), (0, 4), (24, 5), (8, 2)])
    def test_unsupported_depths_and_compressions_are_named_in_the_error(
        self, bits: int, compression: int
    ) -> None:
        data = bytearray(encode(Image.new("RGB", (4, 4)), "BMP"))
        data[28:34] = struct.pack("<HI", bits, compression)
        with pytest.raises(UnsupportedMediaType, match=f"a BMP of {bits} bits per pixel"):
            decode(bytes(data))


class TestSmallFirstFrame:
    """What the first frame of an animation leaves out is transparent, so white."""

    def gif(self, left: int, top: int, size: tuple[int, int], screen: tuple[int, int], mode: str) -> bytes:
        frame = Image.new("RGBA", size, RED)
        if mode == "transparent":
            frame.putpixel((0, 0), (0, 0, 0, 0))
        data = bytearray(encode(frame, "GIF"))
        data[6:10] = struct.pack("<HH", *screen)
        at = data.index(b",", 13 + 3 * 2 ** (data[10] % 8 + 1) if data[10] >> 7 else 13)
        data[at + 1 : at + 5] = struct.pack("<HH", left, top)
        return bytes(data)

    @pytest.mark.parametrize("mode", ["opaque", "transparent"])
    def test_the_rest_of_a_gif_is_white(self, mode: str) -> None:
        expected = np.full((8, 12, 3), WHITE, np.uint8)
        expected[2:5, 4:9] = RED
        if mode == "transparent":
            expected[2, 4] = WHITE
        assert_array_equal(decode(self.gif(4, 2, (5, 3), (12, 8), mode)).pixels, expected)

    def test_a_gif_grows_where_its_first_frame_is_larger(self) -> None:
        expected = np.full((4, 7, 3), WHITE, np.uint8)
        expected[1:, 2:] = RED
        data = self.gif(2, 1, (5, 3), (3, 3), "opaque")
        assert_array_equal(decode(data).pixels, expected)
        assert read_structure(data).declared_pixels == 28

    @pytest.mark.parametrize("alpha", [255, 0])
    @pytest.mark.parametrize("lossless", [True, False])
    def test_the_rest_of_a_webp_is_white(self, alpha: int, *, lossless: bool) -> None:
        image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
        image.paste((*RED, 255), (8, 8, 16, 16))
        image.putpixel((15, 15), (*RED, alpha))
        second = Image.new("RGBA", (16, 16), BLUE)
        save_options = {"save_all": True, "append_images": [second], "lossless": lossless, "quality": 100}
        data = bytearray(encode(image, "WEBP", **save_options))
        expected = np.full((16, 16, 3), WHITE, np.uint8)
        expected[8:, 8:] = RED
        if not alpha:
            expected[15, 15] = WHITE
        assert_allclose(decode(bytes(data)).pixels, expected, atol=0 if lossless else 60)
        at = data.index(b"ANMF")
        assert data[at + 8 : at + 14] != bytes(6), (
            "the encoder must have cropped the frame, or the test tests nothing"
        )


class TestAlphaOnWhite:
    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_half_of_a_color_is_mixed_with_white(self, kind: str) -> None:
        data = encode(Image.new("RGBA", (4, 4), (200, 100, 0, 51)), kind, lossless=True)
        assert_allclose(decode(data).pixels, np.broadcast_to([244, 224, 204], (4, 4, 3)), atol=1)

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
    def test_transparent_pixels_are_white_whatever_their_color(self, kind: str) -> None:
        image = Image.new("RGBA", (4, 2), (*RED, 255))
        image.paste((*GREEN, 0), (2, 0, 4, 2))
        pixels = decode(encode(image, kind, lossless=True)).pixels
        assert pixels[0].tolist() == [[*RED], [*RED], [*WHITE], [*WHITE]]

    def test_grey_with_alpha_is_mixed_with_white(self) -> None:
        data = encode(Image.new("LA", (2, 2), (100, 51)), "PNG")
        assert_allclose(decode(data).pixels, np.full((2, 2, 3), 224), atol=1)

    @pytest.mark.parametrize("transparency", [1, b"\xff\x00\xff"])
    def test_a_transparent_color_of_a_palette_is_white(self, transparency: int | bytes) -> None:
        image = Image.new("P", (3, 1))
        image.putpalette([*RED, *GREEN, *BLUE])
        image.putdata([0, 1, 2])
        pixels = decode(encode(image, "PNG", transparency=transparency)).pixels
        assert pixels[0].tolist() == [[*RED], [*WHITE], [*BLUE]]

    @pytest.mark.parametrize(
        ("mode", "colors", "transparent"), [("L", (9, 90), 90), ("RGB", (RED, GREEN), GREEN)]
    )
    def test_a_single_transparent_color_is_white(self, mode: str, colors: Any, transparent: Any) -> None:
        image = Image.new(mode, (2, 1))
        image.putdata(colors)
        pixels = decode(encode(image, "PNG", transparency=transparent)).pixels
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
        values[0, 1] = 40_000  # two different bytes
        pixels = decode(png16(values, color_type, struct.pack(">H", 40_000) * channels)).pixels
        assert pixels[0].tolist() == [[100, 100, 100], [*WHITE]]

    @pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3)])
    @pytest.mark.parametrize("transparent", [3, 0x1234, 0xFFFE])
    def test_a_transparent_color_is_compared_in_all_its_sixteen_bits(
        self, color_type: int, channels: int, transparent: int
    ) -> None:
        values = np.full((300, 3, channels), transparent, np.uint16)
        values[:, 1] += 1
        values[:, 2, -1] -= 1
        data = png16(values, color_type, struct.pack(">H", transparent) * channels)
        pixels = decode(data).pixels
        assert (pixels[:, 0] == 255).all()
        assert (pixels[:, 1:] == transparent >> 8).all()
        broken = bytearray(data)
        broken[-14] ^= 0xFF  # a checksum
        assert (decode(bytes(broken)).pixels == pixels).all()


class TestDeclaredPixels:
    """The number of pixels is known before an image is decoded."""

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
    def test_it_is_the_number_of_decoded_pixels(self, kind: str, quarters: Pixels) -> None:
        data = encode(Image.fromarray(quarters), kind)
        assert read_structure(data).declared_pixels == 16 * 32 == decode(data).pixels.size / 3

    def test_it_does_not_depend_on_the_orientation(self, quarters: Pixels) -> None:
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = 6
        data = encode(Image.fromarray(quarters), "JPEG", exif=exif)
        assert read_structure(data).declared_pixels == decode(data).pixels.size / 3


@pytest.mark.parametrize("orientation", TO_UPRIGHT)
@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA")])
def test_a_tall_translucent_image_is_flattened_strip_by_strip_without_seams(
    kind: str, mode: str, orientation: int
) -> None:
    noise = np.random.default_rng(2).integers(0, 256, (601, 5, 4), dtype=np.uint8)
    image, exif = Image.fromarray(noise).convert(mode), Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    rgba = np.asarray(image.convert("RGBA"), np.float64)
    alpha = rgba[..., 3:] / 255
    white = TO_UPRIGHT[orientation](np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8))
    expected = white.astype(np.int16)  # so that differences may be negative
    decoded = decode(encode(image, kind, exif=exif, lossless=True, exact=True))
    assert_allclose(decoded.pixels, expected, atol=1)
    assert decoded.pixels.flags.c_contiguous


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize("alpha", [255, 0])
def test_an_animation_is_its_first_frame(kind: str, alpha: int) -> None:
    first, second = Image.new("RGBA", (4, 2), (*RED, 255)), Image.new("RGBA", (4, 2), (*BLUE, 255))
    first.putpixel((3, 1), (*GREEN, alpha))
    save_options = {"save_all": True, "append_images": [second], "lossless": True}
    expected = np.full((2, 4, 3), RED, np.uint8)
    expected[1, 3] = GREEN if alpha else WHITE
    assert_array_equal(decode(encode(first, kind, **save_options)).pixels, expected)
