"""JPEG files: their segments, and the missing share of a damaged image.

ITU T.81, annex B. A JPEG consists of segments, each of which begins with a marker (0xFF and its code). After
each "start of scan" come the compressed data of the scan, which contain no markers except restarts.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import ImageDecodeFailed, UnsupportedMediaType
from gradcam_worker.gradcam.decoding import exif, icc_profile
from gradcam_worker.gradcam.decoding.structure import (
    ICC,
    JPEG,
    MAX_PARTS,
    ColorTag,
    Damage,
    Pixels,
    StoredImage,
    sent_as_text,
)

SIGNATURE = b"\xff\xd8\xff"
MARKER, FILL = 0xFF, 0xFF
END, START_OF_SCAN, JFIF, EXIF, PROFILE, ADOBE = 0xD9, 0xDA, 0xE0, 0xE1, 0xE2, 0xEE
RESTARTS = range(0xD0, 0xD8)
STANDALONE_MARKERS = {0x01, *RESTARTS, 0xD8, END}  # that no length follows
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # "start of frame": depth, size, components
TABLES = {0xC4, 0xCC, 0xDB, 0xDD}  # Huffman, arithmetic, quantization, restart interval
KEPT_SEGMENTS = FRAMES | TABLES | {START_OF_SCAN}
HIERARCHICAL = {0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF}
SAMPLE_BITS = 8
BAD_LENGTH = -1  # reported instead of the code of a segment whose length is wrong
HARMLESS = "Unknown Adobe color transform"  # a complaint of libjpeg about intact images
MAX_SCANS = 64  # progressive images have about ten; one with 302 scans takes 15 s to decode
PLAIN_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
ADOBE_BYTES = 12  # without its length field
PROFILE_START = b"ICC_PROFILE\0"
MAX_PROFILE_PARTS = 255  # their number is one byte
COEFFICIENTS = 64
BLOCK = 8  # side in pixels
DECISIVE_SHARE = 0.5  # missing share above which no more precise figure is needed
GREY = 128  # decoded value of blocks without data
JUNK = np.random.default_rng(0).integers(0, 255, 4096, np.uint8).tobytes()  # contains no 0xFF, so no marker
LENGTH_BYTES = 2  # of the length field, which its value includes
RESTART_INTERVAL = 0xDD
PADDING = b"\0\xff"
MAX_KEPT_PADDING = 2  # bytes that look like padding but may be data: 0xFF is stored as FF 00
RESTART_JUNK_BYTES = 64  # enough for some blocks
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes")


def read(data: bytes) -> StoredImage:
    """Read the structure of a JPEG. In a file of several images only the first counts.

    Args:
        data: The file.

    Returns:
        The image; its damage is what the structure shows.

    Raises:
        ImageDecodeFailed: The header is damaged or cut off, or there are too many segments or scans.
        UnsupportedMediaType: It is hierarchical, or its samples have more than 8 bits.
    """
    parts, frame, orientation, scans, reason = [b"\xff\xd8"], b"", 0, 0, ""
    ended = False
    profile_parts: list[bytes] = []
    for code, body, compressed in _segments(data):
        if code == END:
            ended = True
        elif code == BAD_LENGTH:
            reason = "a segment is damaged"
        elif code in FRAMES and not frame:
            frame = body
            _check_frame(code, body)
        elif code == START_OF_SCAN:
            scans += 1
        elif code == EXIF and body.startswith(b"Exif\0\0") and not orientation:
            orientation = exif.orientation(body)
        parts += _sanitized(code, body), compressed
        profile_parts += _profile_part(code, body)
    if len(frame) < 6 or not scans:  # noqa: PLR2004  # bytes: depth, height, width, components
        message = f"The JPEG's header is damaged or cut off ({len(data):,} bytes received)."
        raise ImageDecodeFailed(message)
    if scans > MAX_SCANS:
        message = f"The JPEG has {scans} scans; at most {MAX_SCANS} are read."
        raise ImageDecodeFailed(message)
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    if not ended:
        reason = "its end marker is missing"
        parts.append(b"\xff\xd9")
    complete = b"".join(parts)
    damage = Damage(_missing_coefficients(complete), reason) if reason else None
    return StoredImage(
        JPEG,
        (width, height),
        complete,
        orientation or exif.UPRIGHT,
        components=frame[5],
        damage=damage,
        color=_join_profile(profile_parts),
    )


def _profile_part(code: int, body: bytes) -> list[bytes]:
    """The part of an ICC profile in a segment, if there is one: its number, their count, its data."""
    return [body.removeprefix(PROFILE_START)] if code == PROFILE and body.startswith(PROFILE_START) else []


def _join_profile(parts: list[bytes]) -> ColorTag | None:
    """Join the parts of a profile; None if there is none, one is missing, or it is too large."""
    count, parts = len(parts), sorted(parts)
    if not 0 < count <= MAX_PROFILE_PARTS or sum(map(len, parts)) > icc_profile.MAX_BYTES:
        return None
    if [part[:2] for part in parts] != [bytes([number, count]) for number in range(1, count + 1)]:
        return None
    return ColorTag(ICC, b"".join(part[2:] for part in parts))


def _segments(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Each segment up to the end marker: its code, its body, and the compressed data after a start of scan.

    Bytes between two segments are skipped, as by libjpeg.
    """
    values = np.frombuffer(data, np.uint8)
    prefixes = np.flatnonzero(values[:-1] == MARKER)
    codes = values[prefixes + 1]
    markers = prefixes[(codes != 0) & (codes != FILL)]
    codes = values[markers + 1]
    scan_ends = markers[(codes < RESTARTS.start) | (codes >= RESTARTS.stop)]
    position, count = 2, 0
    while (index := int(np.searchsorted(markers, position))) < len(markers):
        count += 1
        if count > MAX_PARTS:
            message = f"The JPEG has more than {MAX_PARTS:,} segments."
            raise ImageDecodeFailed(message)
        start = int(markers[index])
        code = data[start + 1]
        position = start + 2
        if code in STANDALONE_MARKERS:
            if code == END:
                yield code, b"", b""
                return
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        body = data[position + 2 : position + length]
        if len(body) != length - LENGTH_BYTES:  # the length is wrong, or the file is cut off
            if code in KEPT_SEGMENTS:
                yield BAD_LENGTH, b"", b""
            continue
        position += length
        compressed = b""
        if code == START_OF_SCAN:
            next_end = int(np.searchsorted(scan_ends, position))
            end = int(scan_ends[next_end]) if next_end < len(scan_ends) else len(data)
            compressed, position = data[position:end], end
        yield code, body, compressed


def _sanitized(code: int, body: bytes) -> bytes:
    """The part of a segment that decoders need; JFIF and Adobe, which decide the colours, are rewritten."""
    if code == END:
        return b"\xff\xd9"
    if code == JFIF:
        return PLAIN_JFIF if body.startswith(b"JFIF\0") and len(body) >= len(PLAIN_JFIF) - 4 else b""
    if code == ADOBE:
        if not body.startswith(b"Adobe") or len(body) < ADOBE_BYTES:
            return b""
        body = body[:ADOBE_BYTES]
    elif code not in KEPT_SEGMENTS:
        return b""
    return bytes([MARKER, code]) + (len(body) + 2).to_bytes(2, "big") + body


def _check_frame(code: int, body: bytes) -> None:
    if code in HIERARCHICAL:
        message = "Received a hierarchical JPEG, which is not read here: baseline and progressive ones are."
        raise UnsupportedMediaType(message)
    if body and body[0] != SAMPLE_BITS:
        message = f"Received a {body[0]}-bit JPEG, which is not read here: {SAMPLE_BITS}-bit ones are."
        raise UnsupportedMediaType(message)


def insert_junk(data: bytes) -> bytes:
    """Insert junk after the compressed data of each scan and restart interval.

    A decoder skips the junk where the data are complete, and decodes it where they are not: the two decoded
    images differ where data are missing.

    Args:
        data: The data of a `StoredImage`.

    Returns:
        A JPEG of the same image.
    """
    parts = [data[:2]]
    mean_scan_bytes = len(data) // max(data.count(bytes([MARKER, START_OF_SCAN])), 1)
    for code, body, compressed in _segments(data):
        parts.append(bytes([MARKER, code]))
        if code == END:
            break
        parts += (len(body) + 2).to_bytes(2, "big"), body
        if code == START_OF_SCAN:
            for piece in re.split(rb"(\xff[\xd0-\xd7])", compressed):  # restart intervals and restarts
                parts += piece, JUNK[:RESTART_JUNK_BYTES] * (piece[:1] != b"\xff")
            parts.append(JUNK * (max(len(compressed), mean_scan_bytes) // len(JUNK) + 1))
    return b"".join(parts)


def strip_padding(data: bytes, complaint: str) -> Iterator[bytes]:
    """Strip zeros and 0xFF bytes from the end of each scan's compressed data; the first few may be data.

    Where zeros replace lost data, a decoder then lacks data, and they count as missing.

    Args:
        data: The data of a `StoredImage`.
        complaint: What libjpeg reports about them.

    Yields:
        The JPEG with at most 0, 1 and 2 such bytes kept; nothing if there is no padding, or if the complaint
        is not about extraneous bytes.
    """
    if not _EXTRANEOUS.search(complaint):
        return
    for kept in range(MAX_KEPT_PADDING + 1):
        parts, dropped = [data[:2]], False
        for code, body, compressed in _segments(data):
            parts.append(bytes([MARKER, code]))
            if code == END:
                break
            end = len(compressed.rstrip(PADDING)) + kept
            dropped |= end < len(compressed)
            parts += (len(body) + LENGTH_BYTES).to_bytes(2, "big"), body, compressed[:end]
        if not dropped:
            return
        yield b"".join(parts)


def measure_damage(
    data: bytes, complaint: str, decoded: Pixels, decode_with_junk: Callable[[], Pixels]
) -> Damage:
    """Measure what a JPEG lacks.

    The missing share is the largest of these: blocks without data; restart intervals, and last bits of
    coefficients, that are in no scan; bytes that belong to no block.

    Args:
        data: The data of a `StoredImage`.
        complaint: What libjpeg reports about them.
        decoded: The pixels (height, width, channels) that it decodes nevertheless.
        decode_with_junk: Decodes the same data with junk inserted, see `insert_junk`.

    Returns:
        The damage.
    """
    scans = b"".join(compressed for _, _, compressed in _segments(data))
    if sent_as_text(scans):
        return Damage(1, "it was transferred as text, in which each line feed has become two bytes")
    match = _EXTRANEOUS.search(complaint)
    extraneous = int(match[1]) / len(data) if match else 0.0
    grey = ~_differs(decoded, GREY)
    missing = _reduce_blocks(grey, np.all)
    share = max(float(missing.mean()), extraneous, _missing_coefficients(data), _missing_intervals(data))
    if share < DECISIVE_SHARE:
        changed = _reduce_blocks(_differs(decoded, decode_with_junk()), np.any)
        share = max(float((missing | changed).mean()), share)
    return Damage(min(share, 1), complaint.removeprefix("Corrupt JPEG data: "))


def _differs(pixels: Pixels, others: Pixels | int) -> NDArray[np.bool_]:
    """Which pixels (height, width) differ in any channel; by channel, which is four times as fast."""
    others = np.broadcast_to(np.asarray(others, np.uint8), pixels.shape)
    differs = np.zeros(pixels.shape[:2], np.bool_)
    for channel in range(pixels.shape[2]):
        differs |= pixels[..., channel] != others[..., channel]
    return differs


def _reduce_blocks(mask: NDArray[np.bool_], reduce: Callable[..., Any]) -> NDArray[np.bool_]:
    """Reduce a mask of pixels to one of blocks by `np.all` or `np.any`; one smaller than a block is kept."""
    height, width = (side // BLOCK for side in mask.shape)
    if not height * width:
        return mask
    cells = mask[: height * BLOCK, : width * BLOCK].reshape(height, BLOCK, width, BLOCK)
    return np.asarray(reduce(cells, axis=(1, 3)))


def _missing_coefficients(data: bytes) -> float:
    """The share of coefficients whose last bit is in none of the scans."""
    complete: dict[int, NDArray[np.bool_]] = {}
    for code, body, _ in _segments(data):
        if code in FRAMES:
            complete = {component: np.zeros(COEFFICIENTS, np.bool_) for component in body[6::3]}
        elif code == START_OF_SCAN:
            first, last, bits = body[-3:].rjust(3, b"\xff")
            for component in _scan_components(body):
                if component in complete and not bits & 0xF:
                    complete[component][first : last + 1] = True
    return 1 - float(np.mean([*complete.values()])) if complete else 1.0


def _missing_intervals(data: bytes) -> float:
    """The largest share of restart intervals that a scan lacks."""
    interval_units, largest = 0, 0.0
    width = height = 0
    sampling: dict[int, tuple[int, int]] = {}  # component -> blocks (across, down) of a unit
    for code, body, compressed in _segments(data):
        if code in FRAMES and len(body) >= 6:  # noqa: PLR2004  # bytes before its components
            height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            sampling = {
                component: (sides >> 4 or 1, sides & 0xF or 1)
                for component, sides in zip(body[6::3], body[7::3], strict=False)
            }
        elif code == RESTART_INTERVAL:
            interval_units = int.from_bytes(body[:2], "big")
        elif code == START_OF_SCAN and interval_units and sampling:
            samplings = [sampling[component] for component in _scan_components(body) if component in sampling]
            across, down = (max(blocks[axis] for blocks in sampling.values()) * BLOCK for axis in (0, 1))
            if len(samplings) == 1:  # its units are single blocks, not those of all components
                across, down = across // samplings[0][0], down // samplings[0][1]
            intervals = -(-(-(-width // across) * -(-height // down)) // interval_units)
            available = len(_RESTART.findall(compressed)) + 1
            largest = max(largest, 1 - available / intervals)
    return largest


def _scan_components(body: bytes) -> bytes:
    """The ids of the components in a start of scan."""
    return body[1 : 1 + 2 * body[0] : 2] if body else b""
