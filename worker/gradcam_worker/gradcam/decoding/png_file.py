"""PNG files: their chunks, and what can be had of damaged pixel data.

PNG, third edition. Pixels are in IDAT, deflated all together; IHDR, PLTE and tRNS say how to read them. What
any other chunk holds, and whether it is well formed, is of no account.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

from gradcam_worker.errors import ImageDecodeFailed
from gradcam_worker.gradcam.decoding import exif
from gradcam_worker.gradcam.decoding.structure import MAX_PARTS, PNG, Damage, Stored

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER_BYTES, DEPTH, COLOR = 13, 8, 9  # of IHDR; where in it the bits of a channel and the colour type stand
RGB, DEEP = 2, 16  # a colour type, without alpha of its own; bits of a channel
FRAME = 12  # bytes of a chunk beside its body: length, name, checksum
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
PALETTE, ALPHA = 3, {4, 6}  # colour types
TRANSPARENT_BYTES = {0: 2, 2: 6}  # of tRNS, by colour type
PASSES = (  # of an interlaced picture: first column, first row, step across, step down
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
PIECE = 512  # bytes that are unpacked at once where data are damaged: what a fault loses at most
BLANK = bytes(1 << 16)
END = bytes(4) + b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class _Chunk:
    name: bytes
    body: memoryview
    written: memoryview  # as it stands in the file
    cut: bool  # the file ends within it

    @property
    def good(self) -> bool:
        """Whether it agrees with its checksum."""
        return not self.cut and zlib.crc32(self.written[4:-4]) == int.from_bytes(self.written[-4:], "big")


def read(data: bytes) -> Stored:
    """Its still picture; of an animation, what it shows where animations are not known.

    Raises ImageDecodeFailed.
    """
    chunks = _chunks(data)
    header = next(chunks, None)
    kept: dict[bytes, list[_Chunk]] = {}
    what, turn = "it ends too early", 0
    color = header.body[COLOR] if header and _is_header(header) else None
    for one in chunks if color is not None else ():
        if one.name == b"IEND":
            what = what if one.cut else ""
            break
        if one.name == b"IDAT" or (one.name not in kept and _counts(one, color, kept)):
            kept.setdefault(one.name, []).append(one)
        elif one.name == b"eXIf" and not turn and one.good:
            turn = exif.orientation(bytes(one.body))
    if header is None or b"IDAT" not in kept:
        message = f"The PNG's header is damaged or cut off ({len(data):,} bytes received)."
        raise ImageDecodeFailed(message)
    if b"tRNS" in kept and not kept[b"tRNS"][0].good:
        del kept[b"tRNS"]  # as libpng does
        what = "its transparency is damaged"
    size = int.from_bytes(header.body[:4], "big"), int.from_bytes(header.body[4:8], "big")
    translucent = color in ALPHA or b"tRNS" in kept
    damage = Damage(0, what) if what else None
    whole = _written(header, *(one for name in (b"PLTE", b"tRNS", b"IDAT") for one in kept.get(name, ())))
    return Stored(PNG, size, whole, turn or exif.UPRIGHT, translucent, damage=damage)


def _is_header(one: _Chunk) -> bool:
    right = one.name == b"IHDR" and len(one.body) == HEADER_BYTES and one.good
    return right and one.body[COLOR] in CHANNELS


def _written(*chunks: _Chunk, pixels: bytes = b"") -> bytes:
    """A file of these chunks, and perhaps one of packed pixels."""
    parts: list[bytes | memoryview] = [SIGNATURE]
    parts += (chunk(one.name, one.body) if one.cut else one.written for one in chunks)
    return b"".join([*parts, chunk(b"IDAT", pixels) if pixels else b"", END])


def _counts(one: _Chunk, color: int | None, before: Mapping[bytes, object]) -> bool:
    """Whether a chunk decides the pixels: a palette, or what of it is transparent, where it may stand.

    Raises ImageDecodeFailed for a palette that is damaged.
    """
    if one.name not in {b"PLTE", b"tRNS"} or b"IDAT" in before:
        return False
    if one.name == b"tRNS":
        return b"PLTE" in before if color == PALETTE else len(one.body) == TRANSPARENT_BYTES.get(color or 0)
    if color == PALETTE and not one.good:
        message = "The PNG's palette is damaged."
        raise ImageDecodeFailed(message)
    return color == PALETTE


def chunk(name: bytes, body: bytes | memoryview) -> bytes:
    """A chunk, with its length and its checksum."""
    whole = name + bytes(body)
    return len(body).to_bytes(4, "big") + whole + zlib.crc32(whole).to_bytes(4, "big")


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """Each chunk, the last one perhaps cut off. Nothing is believed of its length that is not there."""
    at, view = len(SIGNATURE), memoryview(data)
    for _ in range(MAX_PARTS):
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if len(name) < 4:  # noqa: PLR2004  # bytes
            return
        end = at + FRAME + length
        yield _Chunk(name, view[at + 8 : end - 4], view[at:end], cut=end > len(data))
        at = end
    message = f"The PNG has more than {MAX_PARTS:,} chunks."
    raise ImageDecodeFailed(message)


def whole(stored: Stored) -> bool:
    """Whether the pixel data of a `Stored` agree with their checksums."""
    return all(one.good for one in _chunks(stored.data))


def has_deep_transparent_color(stored: Stored) -> bool:
    """Whether one colour of 16 bits a channel is transparent."""
    header = next(_chunks(stored.data)).body
    return stored.translucent and (header[DEPTH], header[COLOR]) == (DEEP, RGB)


def mended(stored: Stored) -> Stored:
    """A picture with what can be had of its damaged pixel data, and nothing (black, or transparent) behind.

    Where the checksum of all pixels together is right, they are, whatever those of the chunks say. Else what
    stands before the first chunk that is not as it was written is right, and so is what is there of a last
    one that is cut off.
    """
    others = [one for one in _chunks(stored.data) if one.name not in {b"IDAT", b"IEND"}]
    bodies = [one for one in _chunks(stored.data) if one.name == b"IDAT"]
    expected = _unpacked_bytes(others[0].body)
    packed, there = _packed_again(b"".join(one.body for one in bodies), expected, whole_only=True)
    if there < expected:
        good = b"".join(one.body for one in takewhile(lambda one: one.good, bodies))
        packed, there = _packed_again(good, expected)
    what = stored.damage.what if stored.damage else "its pixel data are damaged"
    damage = Damage(1 - there / max(expected, 1), what)
    return replace(stored, data=_written(*others, pixels=packed), damage=damage)


def _packed_again(packed: bytes, expected: int, *, whole_only: bool = False) -> tuple[bytes, int]:
    """Pixel data that are damaged, packed anew with zeros behind, and how many of their bytes are not zeros.

    With `whole_only` none counts unless all are there and agree with their checksum.
    """
    unpacker, packer, left = zlib.decompressobj(), zlib.compressobj(1), expected
    again, beyond = [], 0
    try:
        for at in range(0, len(packed), PIECE):
            piece = packed[at : at + PIECE]
            while piece and beyond < len(BLANK):  # what is beyond would be thrown away
                found = unpacker.decompress(piece, len(BLANK))
                again.append(packer.compress(found[:left]))
                beyond += max(len(found) - left, 0)
                left = max(left - len(found), 0)
                piece = unpacker.unconsumed_tail
    except zlib.error:
        pass
    if whole_only and not unpacker.eof:
        return b"", 0
    there = expected - left
    while left:
        again.append(packer.compress(BLANK[:left]))
        left -= min(left, len(BLANK))
    return b"".join([*again, packer.flush()]), there


def _unpacked_bytes(header: memoryview) -> int:
    """How many bytes a picture's rows have, with the one before each that names its filter."""
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    bits = header[8] * CHANNELS[header[9]]
    parts = PASSES if header[12] else ((0, 0, 1, 1),)
    total = 0
    for left, top, across, down in parts:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total
