"""PNG files: their chunks, and the repair of damaged pixel data.

PNG, third edition. The IDAT chunks together hold the pixels as one deflate stream; IHDR, PLTE and tRNS define
their meaning; cICP, iCCP, sRGB, or gAMA with cHRM, their colours. The contents of all other chunks are
ignored, even if they are malformed.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

from gradcam_worker.errors import ImageDecodeFailed
from gradcam_worker.gradcam.decoding import coding_points, exif, icc_profile
from gradcam_worker.gradcam.decoding.structure import (
    CICP,
    GAMMA,
    ICC,
    MAX_PARTS,
    PNG,
    ColorTag,
    Damage,
    StoredImage,
)

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER_BYTES, DEPTH_OFFSET, COLOR_OFFSET = 13, 8, 9  # of IHDR, of its bit depth and its colour type
CHUNK_OVERHEAD_BYTES = 12  # length, name, checksum
DEEP_BITS = 16  # of a channel
RGB_COLOR_TYPE, PALETTE_COLOR_TYPE, ALPHA_COLOR_TYPES = 2, 3, {4, 6}
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
GREY_COLOR_TYPES = {0, 4}
COLOR_CHUNKS = {b"cICP": 4, b"iCCP": 0, b"sRGB": 1, b"gAMA": 4, b"cHRM": 32}  # bytes; 0: any number
TRANSPARENT_COLOR_BYTES = {0: 2, 2: 6}  # of tRNS, by colour type
PASSES = (  # of an interlaced image: first column, first row, column step, row step
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
PIECE_BYTES = 512  # unpacked at a time: at most so many intact bytes are lost before a fault
ZEROS = bytes(1 << 16)
END = bytes(4) + b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class _Chunk:
    name: bytes
    body: memoryview
    encoded: memoryview  # with length, name and checksum
    is_cut_off: bool  # the file ends within it

    @property
    def is_valid(self) -> bool:
        """Whether its checksum is right."""
        return not self.is_cut_off and zlib.crc32(self.encoded[4:-4]) == int.from_bytes(
            self.encoded[-4:], "big"
        )


def read(data: bytes) -> StoredImage:
    """Read the structure of a PNG; of an animation, the still image for programs without animations.

    Args:
        data: The file.

    Returns:
        The image; the share of its damage is 0 until `repair` measures it.

    Raises:
        ImageDecodeFailed: The header or the palette is damaged, or there are too many chunks.
    """
    chunks = _chunks(data)
    header = next(chunks, None)
    kept: dict[bytes, list[_Chunk]] = {}
    colors: dict[bytes, bytes] = {}
    reason, orientation = "it ends too early", 0
    color = header.body[COLOR_OFFSET] if header and _is_header(header) else None
    for chunk in chunks if color is not None else ():
        if chunk.name == b"IEND":
            reason = reason if chunk.is_cut_off else ""
            break
        if chunk.name == b"IDAT" or (chunk.name not in kept and _affects_pixels(chunk, color, kept)):
            kept.setdefault(chunk.name, []).append(chunk)
        elif chunk.name == b"eXIf" and not orientation and chunk.is_valid:
            orientation = exif.orientation(bytes(chunk.body))
        elif chunk.name not in colors and not kept and _tells_colors(chunk):
            colors[chunk.name] = bytes(chunk.body)
    if header is None or b"IDAT" not in kept:
        message = f"The PNG's header is damaged or cut off ({len(data):,} bytes received)."
        raise ImageDecodeFailed(message)
    if b"tRNS" in kept and not kept[b"tRNS"][0].is_valid:
        del kept[b"tRNS"]  # as libpng does
        reason = "its transparency is damaged"
    size = int.from_bytes(header.body[:4], "big"), int.from_bytes(header.body[4:8], "big")
    translucent = color in ALPHA_COLOR_TYPES or b"tRNS" in kept
    damage = Damage(0, reason) if reason else None
    kept_chunks = [chunk for name in (b"PLTE", b"tRNS", b"IDAT") for chunk in kept.get(name, ())]
    file = _build_file(header, *kept_chunks)
    return StoredImage(
        PNG,
        size,
        file,
        orientation or exif.UPRIGHT,
        translucent,
        components=1 if color in GREY_COLOR_TYPES else 3,
        damage=damage,
        color=_color_tag(colors),
    )


def _tells_colors(chunk: _Chunk) -> bool:
    """Whether a chunk says what the colours are, and is valid."""
    size = COLOR_CHUNKS.get(chunk.name, len(chunk.body) + 1) or len(chunk.body)
    return len(chunk.body) == size and chunk.is_valid


def _color_tag(chunks: Mapping[bytes, bytes]) -> ColorTag | None:
    """What these chunks say of the colours: of several the first that the standard ranks above the others."""
    if b"cICP" in chunks and coding_points.is_supported(chunks[b"cICP"]):
        return ColorTag(CICP, chunks[b"cICP"])
    if b"iCCP" in chunks and (profile := _unpack_profile(chunks[b"iCCP"])):
        return ColorTag(ICC, profile)
    if b"sRGB" in chunks or b"gAMA" not in chunks:
        return None
    return ColorTag(GAMMA, chunks[b"gAMA"] + chunks.get(b"cHRM", b""))


def _unpack_profile(body: bytes) -> bytes:
    """The profile in a chunk, after its name and a zero for its compression; empty if there is none."""
    _, _, packed = body.partition(b"\0\0")
    unpacking = zlib.decompressobj()
    try:
        profile = unpacking.decompress(packed, icc_profile.MAX_BYTES)
    except zlib.error:
        return b""
    return profile if unpacking.eof else b""


def _is_header(chunk: _Chunk) -> bool:
    is_valid = chunk.name == b"IHDR" and len(chunk.body) == HEADER_BYTES and chunk.is_valid
    return is_valid and chunk.body[COLOR_OFFSET] in CHANNELS


def _build_file(*chunks: _Chunk, pixels: bytes = b"") -> bytes:
    """A file of these chunks, and optionally of an IDAT chunk with these packed pixels."""
    parts: list[bytes | memoryview] = [SIGNATURE]
    parts += (make_chunk(chunk.name, chunk.body) if chunk.is_cut_off else chunk.encoded for chunk in chunks)
    return b"".join([*parts, make_chunk(b"IDAT", pixels) if pixels else b"", END])


def _affects_pixels(chunk: _Chunk, color: int | None, kept: Mapping[bytes, object]) -> bool:
    """Whether a chunk is a palette, or transparency, in a valid position.

    Raises ImageDecodeFailed for a palette that is damaged.
    """
    if chunk.name not in {b"PLTE", b"tRNS"} or b"IDAT" in kept:
        return False
    if chunk.name == b"tRNS":
        return (
            b"PLTE" in kept
            if color == PALETTE_COLOR_TYPE
            else len(chunk.body) == TRANSPARENT_COLOR_BYTES.get(color or 0)
        )
    if color == PALETTE_COLOR_TYPE and not chunk.is_valid:
        message = "The PNG's palette is damaged."
        raise ImageDecodeFailed(message)
    return color == PALETTE_COLOR_TYPE


def make_chunk(name: bytes, body: bytes | memoryview) -> bytes:
    """Make a chunk, with its length and checksum.

    Args:
        name: Four characters.
        body: Its contents.

    Returns:
        The chunk as it is stored in a file.
    """
    checked = name + bytes(body)
    return len(body).to_bytes(4, "big") + checked + zlib.crc32(checked).to_bytes(4, "big")


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """Each chunk; the last one may be cut off, and its declared length is not trusted."""
    position, view = len(SIGNATURE), memoryview(data)
    for _ in range(MAX_PARTS):
        length, name = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if len(name) < 4:  # noqa: PLR2004  # bytes
            return
        end = position + CHUNK_OVERHEAD_BYTES + length
        yield _Chunk(name, view[position + 8 : end - 4], view[position:end], is_cut_off=end > len(data))
        position = end
    message = f"The PNG has more than {MAX_PARTS:,} chunks."
    raise ImageDecodeFailed(message)


def has_valid_checksums(stored: StoredImage) -> bool:
    """Whether the checksums of all chunks of an image are right."""
    return all(chunk.is_valid for chunk in _chunks(stored.data))


def has_deep_transparent_color(stored: StoredImage) -> bool:
    """Whether one colour, of 16 bits a channel, is transparent."""
    header = next(_chunks(stored.data)).body
    return stored.translucent and (header[DEPTH_OFFSET], header[COLOR_OFFSET]) == (DEEP_BITS, RGB_COLOR_TYPE)


def repair(stored: StoredImage) -> StoredImage:
    """Repair an image with damaged pixel data: keep the intact part, and fill the rest with zeros.

    If the checksum of the whole deflate stream is right, all pixels are intact, whatever the checksums of the
    chunks. Otherwise the pixels before the first invalid chunk are intact.

    Args:
        stored: The image.

    Returns:
        The repaired image, and the missing share as its damage.
    """
    other_chunks = [chunk for chunk in _chunks(stored.data) if chunk.name not in {b"IDAT", b"IEND"}]
    pixel_chunks = [chunk for chunk in _chunks(stored.data) if chunk.name == b"IDAT"]
    expected = _unpacked_bytes(other_chunks[0].body)
    packed, intact = _repack(b"".join(chunk.body for chunk in pixel_chunks), expected, complete_only=True)
    if intact < expected:
        valid = b"".join(chunk.body for chunk in takewhile(lambda chunk: chunk.is_valid, pixel_chunks))
        packed, intact = _repack(valid, expected)
    reason = stored.damage.what if stored.damage else "its pixel data are damaged"
    damage = Damage(1 - intact / max(expected, 1), reason)
    return replace(stored, data=_build_file(*other_chunks, pixels=packed), damage=damage)


def _repack(packed: bytes, expected: int, *, complete_only: bool = False) -> tuple[bytes, int]:
    """Pack the intact part of damaged pixel data again, filled with zeros. Returns the data and its size.

    With `complete_only` nothing is returned unless the deflate stream is complete and its checksum is right.
    """
    decompressor, compressor, left = zlib.decompressobj(), zlib.compressobj(1), expected
    repacked, surplus = [], 0
    try:
        for position in range(0, len(packed), PIECE_BYTES):
            piece = packed[position : position + PIECE_BYTES]
            while piece and surplus < len(ZEROS):  # the surplus is dropped
                unpacked = decompressor.decompress(piece, len(ZEROS))
                repacked.append(compressor.compress(unpacked[:left]))
                surplus += max(len(unpacked) - left, 0)
                left = max(left - len(unpacked), 0)
                piece = decompressor.unconsumed_tail
    except zlib.error:
        pass
    if complete_only and not decompressor.eof:
        return b"", 0
    intact = expected - left
    while left:
        repacked.append(compressor.compress(ZEROS[:left]))
        left -= min(left, len(ZEROS))
    return b"".join([*repacked, compressor.flush()]), intact


def _unpacked_bytes(header: memoryview) -> int:
    """The size of the unpacked rows, each with one byte for its filter."""
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    bits = header[8] * CHANNELS[header[9]]
    passes = PASSES if header[12] else ((0, 0, 1, 1),)
    total = 0
    for left, top, column_step, row_step in passes:
        columns, rows = -(-(width - left) // column_step), -(-(height - top) // row_step)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits + 7) // 8)
    return total
