"""Image files with colour profiles and colour chunks, made by hand."""

import io
import itertools
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from gradcam_worker.gradcam.decoding.coding_points import D65, PRIMARIES
from gradcam_worker.gradcam.decoding.icc_profile import Chromaticity, Curve, make

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
P3, BT2020 = PRIMARIES[12][0], PRIMARIES[9][0]
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))


def srgb_curve(values: Floats) -> Floats:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def gamma(exponent: float) -> Curve:
    return lambda values: values**exponent


def named(profile: bytes | None, name: str = "") -> bytes:
    """A profile with a description, as of ICC version 2."""
    assert profile
    text = name.encode("latin-1") + b"\0"
    return with_tag(profile, b"desc", b"desc" + bytes(4) + len(text).to_bytes(4, "big") + text + bytes(80))


def with_tag(profile: bytes, tag: bytes, content: bytes) -> bytes:
    """A profile with one more tag: behind the last one's content, and all offsets moved by its entry."""
    count = int.from_bytes(profile[128:132], "big")
    entries = b""
    for index in range(count):
        entry = profile[132 + 12 * index : 144 + 12 * index]
        entries += entry[:4] + (int.from_bytes(entry[4:8], "big") + 12).to_bytes(4, "big") + entry[8:]
    entries += tag + struct.pack(">II", len(profile) + 12, len(content))
    rest = entries + profile[132 + 12 * count :] + content
    return struct.pack(">I", 132 + len(rest)) + profile[4:128] + struct.pack(">I", count + 1) + rest


DISPLAY_P3 = named(make(P3, D65, srgb_curve), "Display P3")
ADOBE = named(make(ADOBE_RGB, D65, gamma(563 / 256)), "Adobe RGB (1998)")


def grey_profile(exponent: float) -> bytes:
    """A profile of one grey channel."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(exponent * 256))
    head = bytes(4) + b"\x02\x10\0\0mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return with_tag(struct.pack(">I", 132) + head + struct.pack(">I", 0), b"kTRC", curve)


def cmyk_profile() -> bytes:
    """A profile of four inks that differ from the usual: all colours are weaker."""
    corners: list[int] = []
    for cyan, magenta, yellow, black in itertools.product(np.linspace(0, 1, 9), repeat=4):
        left = 1 - black
        lightness = left * (255 - 40 * (cyan + magenta + yellow))
        corners += map(round, (lightness, 128 + 30 * left * (magenta - cyan), 128 + 40 * left * yellow))
    ramp = bytes(range(256))
    table = (
        b"mft1" + bytes(4) + bytes([4, 3, 9, 0]) + struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536)
    )
    table += ramp * 4 + bytes(corners) + ramp * 3
    head = bytes(4) + b"\x02\x10\0\0prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return with_tag(struct.pack(">I", 132) + head + struct.pack(">I", 0), b"A2B0", table)


def colors_of_a_cube() -> Pixels:
    """Every combination of six levels (12, 18, 3), and greys."""
    cube = np.array([*itertools.product((0, 30, 85, 160, 220, 255), repeat=3)], np.uint8)
    return cube.reshape(12, 18, 3)


COLORS = colors_of_a_cube()


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels: Pixels, *chunks: tuple[bytes, bytes], mode: str | None = None, **options: Any) -> bytes:
    """A PNG with these chunks behind its header."""
    image = Image.fromarray(pixels)
    data = encode(image.convert(mode) if mode else image, "PNG", **options)
    return data[:33] + b"".join(chunk(*each) for each in chunks) + data[33:]


def deep_png(pixels: Pixels, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits a channel, with these chunks."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    whole = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in whole)


def iccp(profile: bytes, name: bytes = b"any") -> tuple[bytes, bytes]:
    return b"iCCP", name + b"\0\0" + zlib.compress(profile)


def gama(encoding: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(encoding * 100_000))


def chrm(*points: Chromaticity) -> tuple[bytes, bytes]:
    return b"cHRM", b"".join(
        struct.pack(">2I", *(round(number * 100_000) for number in point)) for point in points
    )


def bmp(pixels: Pixels, profile: bytes) -> bytes:
    """A BMP with the longest header, whose profile follows the pixels."""
    height, width, _ = pixels.shape
    rows = pixels[::-1, :, ::-1].tobytes()  # 18 pixels of 3 bytes need two more
    rows = b"".join(row.tobytes() + bytes(-3 * width % 4) for row in pixels[::-1, :, ::-1])
    header = struct.pack("<IiiHHI", 124, width, height, 1, 24, 0) + bytes(36) + b"DEBM" + bytes(48)
    header += struct.pack("<IIII", 4, 124 + len(rows), len(profile), 0)
    head = b"BM" + struct.pack("<IIII", 14 + len(header) + len(rows), 0, 14 + len(header), 0)[:12]
    return head + header + rows + profile
