"""JPEG files: their segments, and how much of the picture a damaged one lacks.

ITU T.81, annex B. A JPEG is segments, each behind a marker (0xFF and its code), and behind each "start of
scan" the compressed data of a scan, which hold no marker but restarts.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import ImageDecodeFailed, UnsupportedMediaType
from gradcam_worker.gradcam.decoding import exif
from gradcam_worker.gradcam.decoding.structure import JPEG, MAX_PARTS, Damage, Stored, sent_as_text

Pixels = NDArray[np.uint8]

SIGNATURE = b"\xff\xd8\xff"
MARKER, FILL = 0xFF, 0xFF
END, START_OF_SCAN, JFIF, EXIF, ADOBE = 0xD9, 0xDA, 0xE0, 0xE1, 0xEE
RESTARTS = range(0xD0, 0xD8)
BARE = {0x01, *RESTARTS, 0xD8, END}  # markers without a length behind them
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # "start of frame": size, depth, components
TABLES = {0xC4, 0xCC, 0xDB, 0xDD}  # Huffman, arithmetic, quantization, restart interval
NEEDED = FRAMES | TABLES | {START_OF_SCAN}
HIERARCHICAL = {0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF}
BITS = 8  # of a sample
BAD_LENGTH = -1  # in place of the code of a segment that is not as long as it says
HARMLESS = "Unknown Adobe color transform"  # what libjpeg says of a picture that is whole, and goes on
MAX_SCANS = 64  # progressive pictures have about ten; one with 302 scans takes 15 s to decode
PLAIN_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
ADOBE_BYTES = 12  # without the two of its length
COEFFICIENTS = 64
BLOCK = 8  # pixels of a side
SURE = 0.5  # share that is missing, above which it need not be known better
GREY = 128  # what decoders put where they have no data
JUNK = np.random.default_rng(0).integers(0, 255, 4096, np.uint8).tobytes()  # without a marker: no 0xFF
LENGTH_BYTES = 2  # which a segment's length counts, too
RESTART_INTERVAL = 0xDD
PADDING = b"\0\xff"
LAST_BYTES = 2  # of a scan's data that may be its own although they look like padding: 0xFF is written FF 00
RESTART_JUNK = 64  # bytes: enough for some blocks
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes")


def read(data: bytes) -> Stored:
    """Its first picture: what follows its end, as in files of several pictures, does not count.

    Raises ImageDecodeFailed, UnsupportedMediaType.
    """
    parts, frame, turn, scans, what = [b"\xff\xd8"], b"", 0, 0, ""
    ended = False
    for code, body, compressed in _segments(data):
        if code == END:
            ended = True
        elif code == BAD_LENGTH:
            what = "a segment is damaged"
        elif code in FRAMES and not frame:
            frame = body
            _check_frame(code, body)
        elif code == START_OF_SCAN:
            scans += 1
        elif code == EXIF and body.startswith(b"Exif\0\0") and not turn:
            turn = exif.orientation(body)
        parts += _kept(code, body), compressed
    if len(frame) < 6 or not scans:  # noqa: PLR2004  # bytes: depth, height, width, components
        message = f"The JPEG's header is damaged or cut off ({len(data):,} bytes received)."
        raise ImageDecodeFailed(message)
    if scans > MAX_SCANS:
        message = f"The JPEG has {scans} scans; at most {MAX_SCANS} are read."
        raise ImageDecodeFailed(message)
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    if not ended:
        what = "its end marker is missing"
        parts.append(b"\xff\xd9")
    whole = b"".join(parts)
    damage = Damage(_incomplete(whole), what) if what else None
    return Stored(JPEG, (width, height), whole, turn or exif.UPRIGHT, components=frame[5], damage=damage)


def _segments(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Each segment's code and body, with the compressed data that follow a start of scan; up to the end.

    Bytes between two segments are passed over, as libjpeg does.
    """
    codes = np.frombuffer(data, np.uint8)
    fills = np.flatnonzero(codes[:-1] == MARKER)
    follow = codes[fills + 1]
    places = fills[(follow != 0) & (follow != FILL)]
    inside = places[(codes[places + 1] < RESTARTS.start) | (codes[places + 1] >= RESTARTS.stop)]
    at, count = 2, 0
    while (index := int(np.searchsorted(places, at))) < len(places):
        count += 1
        if count > MAX_PARTS:
            message = f"The JPEG has more than {MAX_PARTS:,} segments."
            raise ImageDecodeFailed(message)
        start = int(places[index])
        code = data[start + 1]
        at = start + 2
        if code in BARE:
            if code == END:
                yield code, b"", b""
                return
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        body = data[at + 2 : at + length]
        if len(body) != length - LENGTH_BYTES:  # its length is wrong, or it is cut off
            if code in NEEDED:
                yield BAD_LENGTH, b"", b""
            continue
        at += length
        compressed = b""
        if code == START_OF_SCAN:
            behind = int(np.searchsorted(inside, at))
            end = int(inside[behind]) if behind < len(inside) else len(data)
            compressed, at = data[at:end], end
        yield code, body, compressed


def _kept(code: int, body: bytes) -> bytes:
    """What of a segment a decoder gets: JFIF and Adobe count for the colours, and are written anew."""
    if code == END:
        return b"\xff\xd9"
    if code == JFIF:
        return PLAIN_JFIF if body.startswith(b"JFIF\0") and len(body) >= len(PLAIN_JFIF) - 4 else b""
    if code == ADOBE:
        if not body.startswith(b"Adobe") or len(body) < ADOBE_BYTES:
            return b""
        body = body[:ADOBE_BYTES]
    elif code not in NEEDED:
        return b""
    return bytes([MARKER, code]) + (len(body) + 2).to_bytes(2, "big") + body


def _check_frame(code: int, body: bytes) -> None:
    if code in HIERARCHICAL:
        message = "Received a hierarchical JPEG, which is not read here: baseline and progressive ones are."
        raise UnsupportedMediaType(message)
    if body and body[0] != BITS:
        message = f"Received a {body[0]}-bit JPEG, which is not read here: {BITS}-bit ones are."
        raise UnsupportedMediaType(message)


def with_junk(data: bytes) -> bytes:
    """The same picture with junk behind the compressed data of each scan and restart interval.

    A decoder passes over it where the data are whole. Where they are not, it takes it for data: the pictures
    differ where it had none.
    """
    parts = [data[:2]]
    even = len(data) // max(data.count(bytes([MARKER, START_OF_SCAN])), 1)
    for code, body, compressed in _segments(data):
        parts.append(bytes([MARKER, code]))
        if code == END:
            break
        parts += (len(body) + 2).to_bytes(2, "big"), body
        if code == START_OF_SCAN:
            pieces = re.split(rb"(\xff[\xd0-\xd7])", compressed)
            parts += [
                part for piece in pieces for part in (piece, JUNK[:RESTART_JUNK] * (piece[:1] != b"\xff"))
            ]
            parts.append(JUNK * (max(len(compressed), even) // len(JUNK) + 1))
    return b"".join(parts)


def without_padding(data: bytes, said: str) -> Iterator[bytes]:
    """The same picture without the zeros, and bytes of 0xFF, at the end of each scan's compressed data.

    A few that may be data are left, none at first. Nothing comes where there is no padding, or no decoder
    `said` that bytes are left over. What one would take from padding, it then has no data for: where zeros
    stand for lost data, these count as missing.
    """
    if not _EXTRANEOUS.search(said):
        return
    for kept in range(LAST_BYTES + 1):
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


def damage(data: bytes, said: str, shown: Pixels, with_junk: Callable[[], Pixels]) -> Damage:
    """What the picture of a `Stored` lacks, of which a decoder `said` that it is damaged.

    `shown` is what it made of it, (height, width, channels), and `with_junk` makes the same with junk behind
    its data. The share that is missing is the largest of these: blocks for which there were no data; restart
    intervals, and last bits of coefficients, that are in no scan; bytes that belong to no block.
    """
    scans = b"".join(compressed for _, _, compressed in _segments(data))
    if sent_as_text(scans):
        return Damage(1, "it was transferred as text, in which each line feed has become two bytes")
    found = _EXTRANEOUS.search(said)
    extraneous = int(found[1]) / len(data) if found else 0.0
    grey = (shown == GREY).all(axis=2)
    missing = _blocks(grey, np.all)
    share = max(float(missing.mean()), extraneous, _incomplete(data), _missing_intervals(data))
    if share < SURE:
        changed = (shown != with_junk()).any(axis=2)
        share = max(float((missing | _blocks(changed, np.any)).mean()), share)
    return Damage(min(share, 1), said.removeprefix("Corrupt JPEG data: "))


def _blocks(pixels: NDArray[np.bool_], kind: Callable[..., Any]) -> NDArray[np.bool_]:
    """Whether `kind` (all, any) of the pixels of each block are so; of a smaller picture, each pixel."""
    height, width = (side // BLOCK for side in pixels.shape)
    if not height * width:
        return pixels
    cells = pixels[: height * BLOCK, : width * BLOCK].reshape(height, BLOCK, width, BLOCK)
    return np.asarray(kind(cells, axis=(1, 3)))


def _incomplete(data: bytes) -> float:
    """The share of coefficients of which the last bit is in none of the scans that are there."""
    whole: dict[int, NDArray[np.bool_]] = {}
    for code, body, _ in _segments(data):
        if code in FRAMES:
            whole = {one: np.zeros(COEFFICIENTS, np.bool_) for one in body[6::3]}
        elif code == START_OF_SCAN:
            first, last, bits = body[-3:].rjust(3, b"\xff")
            for one in _scanned(body):
                if one in whole and not bits & 0xF:
                    whole[one][first : last + 1] = True
    return 1 - float(np.mean([*whole.values()])) if whole else 1.0


def _missing_intervals(data: bytes) -> float:
    """The share of restart intervals that a scan lacks, of the scan that lacks most."""
    every, most = 0, 0.0
    width = height = 0
    sampling: dict[int, tuple[int, int]] = {}  # component -> blocks (across, down) of a unit
    for code, body, compressed in _segments(data):
        if code in FRAMES and len(body) >= 6:  # noqa: PLR2004  # bytes before its components
            height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            sampling = {
                one: (sides >> 4 or 1, sides & 0xF or 1)
                for one, sides in zip(body[6::3], body[7::3], strict=False)
            }
        elif code == RESTART_INTERVAL:
            every = int.from_bytes(body[:2], "big")
        elif code == START_OF_SCAN and every and sampling:
            scanned = [sampling[one] for one in _scanned(body) if one in sampling]
            across, down = (max(one[axis] for one in sampling.values()) * BLOCK for axis in (0, 1))
            if len(scanned) == 1:  # its units are blocks, not those of all components
                across, down = across // scanned[0][0], down // scanned[0][1]
            intervals = -(-(-(-width // across) * -(-height // down)) // every)
            there = len(_RESTART.findall(compressed)) + 1
            most = max(most, 1 - there / intervals)
    return most


def _scanned(body: bytes) -> bytes:
    """The components of a start of scan."""
    return body[1 : 1 + 2 * body[0] : 2] if body else b""
