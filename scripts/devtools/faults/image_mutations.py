"""Seeded images with something wrong in them, in every format that is read here, and some that are not.

`mutations(count, seed)` yields as many, the same ones for the same seed, each with the name of what was done.
"""

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SIDE = 96  # pixels of an image before it is damaged: enough for every structure that a format has
HUGE = (0, 1, 2**15 - 1, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)  # where counters overflow
ORIENTATION, MAKER_NOTE = 0x112, 0x927C  # EXIF tags
# Not read here: they have to be refused, however they are called and wherever they are cut.
REFUSED = ("TIFF", "JPEG2000", "AVIF", "ICNS", "PPM")
MANY_SCANS = (40, 65, 300)  # around what is read, and far above
PNG, GIF_BLOCK = b"\x89PNG\r\n\x1a\n", b"!\xfe"


class Mutant(NamedTuple):
    """An image that has been tampered with: its kind and what was done to it, and its bytes."""

    name: str
    data: bytes


def _noise(mode: str) -> Image.Image:
    """Smooth colours with noise in them, so that no codec can leave anything out."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    grain = np.random.default_rng(1).integers(0, 64, (SIDE, SIDE))
    planes = [rows * 2, columns * 2, rows + columns, 255 - rows * 2]
    pixels = np.clip(np.stack(planes, axis=-1) + grain[..., None], 0, 255).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    image = Image.fromarray(pixels)
    return image.convert(mode) if mode in {"RGBA", "LA"} else image.convert("RGB").convert(mode)


def _saved(mode: str, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    _noise(mode).save(file, kind, **options)
    return file.getvalue()


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[0x10F] = "A camera"
    exif.get_ifd(0x8769)[MAKER_NOTE] = bytes(200)
    return exif


def chunk(name: bytes, data: bytes, claimed: int | None = None) -> bytes:
    """A chunk of a PNG, which may claim another length than it has."""
    length = len(data) if claimed is None else claimed
    return struct.pack(">I", length) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(depth: int, color: int, channels: int, *between: bytes) -> bytes:
    """A PNG by hand, of a depth and colour type that Pillow does not write."""
    rng = random.Random(depth * 8 + color)  # noqa: S311  # noise, not a secret
    rows = b"".join(b"\0" + rng.randbytes((SIDE * channels * depth + 7) // 8) for _ in range(SIDE))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, color, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *between, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return PNG + b"".join(parts)


@cache
def whole() -> dict[str, bytes]:
    """An undamaged image of every kind, by a name that ends in its mode."""
    more = {"save_all": True, "append_images": [_noise("RGB").rotate(90), _noise("RGB").rotate(180)]}
    plain: dict[str, tuple[str, ...]] = {"JPEG": ("L",), "GIF": ("P",), **dict.fromkeys(REFUSED, ("RGB",))}
    plain |= {"PNG": ("RGBA", "LA", "1", "I;16"), "BMP": ("RGB", "RGBA", "P", "1")}
    with_exif = {"JPEG": ("RGB", "CMYK"), "PNG": ("RGB",), "WEBP": ("RGB", "RGBA")}
    palette, transparency = chunk(b"PLTE", bytes(range(48))), b"\x12\x34"
    return {
        **{f"{kind} {mode}": _saved(mode, kind) for kind, modes in plain.items() for mode in modes},
        **{
            f"{kind} EXIF {mode}": _saved(mode, kind, exif=_exif())
            for kind, modes in with_exif.items()
            for mode in modes
        },
        **{f"{kind} animated RGB": _saved("RGB", kind, **more) for kind in ("MPO", "PNG", "WEBP", "GIF")},
        **{f"{kind} transparent P": _saved("P", kind, transparency=3) for kind in ("PNG", "GIF")},
        "JPEG progressive RGB": _saved("RGB", "JPEG", progressive=True),
        "JPEG restarts RGB": _saved("RGB", "JPEG", restart_marker_blocks=1),
        "WEBP lossless RGBA": _saved("RGBA", "WEBP", lossless=True),
        "PNG transparent 16": _png(16, 0, 1, chunk(b"tRNS", transparency)),
        "PNG transparent 48": _png(16, 2, 3, chunk(b"tRNS", transparency * 3)),
        "PNG 64": _png(16, 6, 4),
        "PNG palette 4": _png(4, 3, 1, palette, chunk(b"tRNS", bytes(range(16)))),
    }


def _truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _flipped(data: bytes, rng: random.Random) -> bytes:
    """Single bits anywhere, or whole bytes in the head, where formats keep their sizes, counts and flags."""
    changed, head = bytearray(data), rng.random() < 0.5  # noqa: PLR2004  # as often
    for _ in range(rng.choice((1, 3, 4) if head else (1, 3, 10, 100))):
        at = rng.randrange(min(len(changed), 64) if head else len(changed))
        changed[at] ^= rng.randrange(1, 256) if head else 1 << rng.randrange(8)
    return bytes(changed)


def _lying(data: bytes, rng: random.Random) -> bytes:
    """A number somewhere in the first part, which holds the lengths, says something huge."""
    width = rng.choice((1, 2, 3, 4))
    at = rng.randrange(max(min(len(data), 800) - width, 1))
    value = rng.choice(HUGE).to_bytes(4, "big")[-width:]
    return data[:at] + rng.choice((value, value[::-1])) + data[at + width :]


def _repeated(data: bytes, rng: random.Random) -> bytes:
    """A piece that is missing, or comes twice, or very many times."""
    at, size = rng.randrange(len(data)), rng.randint(1, 400)
    return data[:at] + data[at : at + size] * rng.choice((0, 0, 2, 50, 500)) + data[at + size :]


def _emptied(data: bytes, rng: random.Random) -> bytes:
    """A stretch of one byte only."""
    at, size = rng.randrange(len(data)), rng.randint(1, 2000)
    return data[:at] + bytes([rng.choice((0, 255))]) * min(size, len(data) - at) + data[at + size :]


def _spliced(data: bytes, rng: random.Random) -> bytes:
    """The beginning of one format, from a few bytes on, and the end of another."""
    other = rng.choice(list(whole().values()))
    kept = rng.choice((2, 4, 8, 12, 16, rng.randrange(len(data))))
    return data[:kept] + other[rng.choice((kept, rng.randrange(len(other)))) :]


def _polyglot(data: bytes, rng: random.Random) -> bytes:
    """Two files in one, or a file with something else before or behind it."""
    texts = (b"<html><script>alert(1)</script></html>", b"%PDF-1.7\n", b"#!/bin/sh\n")
    extra = rng.choice((*whole().values(), *texts, b"PK\x03\x04" + bytes(200), bytes(100_000)))
    return data + extra if rng.random() < 0.7 else extra + data  # noqa: PLR2004  # mostly behind: that is read


def _huge(data: bytes, rng: random.Random) -> bytes:
    """The width and height that the header claims are huge, or nothing, or allowed but not there."""
    width, height = (rng.choice((0, 1, 3000, 7999, 32_767, 40_000, 65_535)) for _ in range(2))
    if data.startswith(PNG):
        header = struct.pack(">II", width, height) + data[24:29]
        return PNG + chunk(b"IHDR", header) + data[33:]
    if data.startswith(b"GIF8"):
        at = rng.choice((5, max(data.find(b",") + 4, 5)))  # the screen's size, or the first frame's
        return data[: at + 1] + struct.pack("<HH", width, height) + data[at + 5 :]
    if data.startswith(b"BM"):
        return data[:18] + struct.pack("<ii", width, rng.choice((height, -height))) + data[26:]
    if data.startswith(b"\xff\xd8"):
        at = next((data.find(mark) for mark in (b"\xff\xc0", b"\xff\xc2") if mark in data), 0)
        return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]
    if data[8:12] == b"WEBP":
        return data[:24] + struct.pack("<HH", width & 0x3FFF, height & 0x3FFF) + data[28:]
    return _lying(data, rng)


def _structured(data: bytes, rng: random.Random) -> bytes:
    """What only this format has: scans, EXIF, chunks, blocks."""
    if data.startswith(PNG):
        return _chunks(data, rng)
    if data.startswith(b"\xff\xd8"):
        return _segments(data, rng)
    if data.startswith(b"GIF8"):
        at = data.find(GIF_BLOCK) if GIF_BLOCK in data else 13
        return data[:at] + (GIF_BLOCK + b"\xff" + bytes(255)) * rng.choice((1, 500)) + b"\0" + data[at:]
    if data[8:12] == b"WEBP":
        size = rng.choice(HUGE) % 2**32
        name = rng.choice((b"EXIF", b"ICCP", b"ALPH", b"ANMF", b"VP8X", b"XMP ", b"junk"))
        return data[:12] + name + struct.pack("<I", size) + rng.randbytes(rng.randint(0, 64)) + data[12:]
    return _lying(data, rng)


def _chunks(data: bytes, rng: random.Random) -> bytes:
    """A PNG with a chunk that lies, comes twice, is in the wrong place, or unpacks to very much."""
    name = rng.choice(b"tRNS PLTE zTXt iCCP iTXt eXIf IDAT acTL fcTL gAMA".split())
    packed = zlib.compress(bytes(rng.choice((10, 10_000_000))))
    body = rng.choice((b"", rng.randbytes(40), b"a\0\0" + packed, b"MM\0*\0\0\0\x08\xff\xff", packed))
    new = chunk(name, body, rng.choice((None, None, *HUGE)))
    at = rng.choice((8, 33, max(data.find(b"IDAT") - 4, 8), len(data) - 12))
    return data[:at] + new * rng.choice((1, 1, 2, 2000 if len(body) < SIDE else 3)) + data[at:]


def _segments(data: bytes, rng: random.Random) -> bytes:
    """A JPEG of many scans, or with EXIF that is damaged, endless or a circle."""
    first = data.find(b"\xff\xda")
    if rng.random() < 0.4 and first > 0:  # noqa: PLR2004  # the rest is EXIF and tables
        return data[:first] + data[first:-2] * rng.choice(MANY_SCANS) + data[-2:]
    order = rng.choice((b"MM\0*", b"II*\0"))
    offset = struct.pack(">I" if order[:1] == b"M" else "<I", rng.choice((8, *HUGE)))
    entries = rng.choice((b"\xff\xff", b"\0\x01", b"\x01\0", b"\0\0")) + rng.randbytes(rng.choice((12, 600)))
    body = b"Exif\0\0" + order + offset + entries + b"\0\0\0\x08"
    marker = rng.choice((b"\xff\xe1", b"\xff\xe1", b"\xff\xe2", b"\xff\xdb", b"\xff\xc4", b"\xff\xdd"))
    length = rng.choice((len(body) + 2, len(body) + 2, 0, 1, 0xFFFF))
    return data[:2] + marker + struct.pack(">H", length) + body + data[2:]


Way = Callable[[bytes, random.Random], bytes]
OF_BYTES: tuple[Way, ...] = (_truncated, _flipped, _lying, _repeated, _emptied, _spliced, _polyglot)
OF_FORMATS: tuple[Way, ...] = (_huge, _structured)
WAYS = OF_BYTES + OF_FORMATS


def mutations(count: int, seed: int) -> Iterator[Mutant]:
    """Yield `count` images; every kind meets every way as soon as there are enough of them."""
    rng = random.Random(seed)  # noqa: S311  # the same ones every time: that is what it is for
    kinds = list(whole().items())
    pairs = [(kind, way) for way in WAYS for kind in kinds]
    rng.shuffle(pairs)
    for number in range(count):
        (kind, data), way = pairs[number % len(pairs)]
        for _ in range(1 if number < len(pairs) else rng.choice((1, 1, 1, 2, 3))):
            data = way(data, rng) or data[:1]
            name = f"{kind}{way.__name__}"
            way = rng.choice(WAYS)
        yield Mutant(name.replace("_", " "), data)
