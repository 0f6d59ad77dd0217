"""ICC profiles (ICC.1): a strict subset of an embedded one, and profiles made from primaries and a curve.

An embedded profile is untrusted. Only its tags that decide how colours are converted are kept, and
only in the encodings whose cost is bounded by their size: a profile with `D2B0` can ask for half a million
matrices for each colour.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Curve = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # encoded values to light, both from 0 to 1
Chromaticity = tuple[float, float]  # CIE x and y

GREY, RGB, CMYK = "GRAY", "RGB", "CMYK"  # colour spaces
MAX_BYTES = 4 * 1024**2  # the largest profiles in use, for printing in four inks, have 2 to 3 MB
HEADER_BYTES, ENTRY_BYTES, MAX_TAGS = 128, 12, 100
MAX_VERSION = 4
DEVICE_CLASSES = {b"mntr", b"scnr", b"prtr", b"spac"}  # display, input, output, colour space
CONNECTION_SPACES = {b"XYZ ", b"Lab "}
CURVES, TABLES = {b"curv", b"para"}, {b"mft1", b"mft2", b"mAB "}
TEXTS, MAX_TEXT_BYTES = {b"desc", b"mluc"}, 16_384
KEPT_TAGS = {  # tag -> the encodings of its content that are kept
    b"rXYZ": {b"XYZ "},
    b"gXYZ": {b"XYZ "},
    b"bXYZ": {b"XYZ "},
    b"rTRC": CURVES,
    b"gTRC": CURVES,
    b"bTRC": CURVES,
    b"kTRC": CURVES,
    b"A2B0": TABLES,
    b"desc": TEXTS,
}
CURVE_POINTS = 4096
D50 = np.array([0.9642, 1.0, 0.8249])  # XYZ of the white of every profile
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def color_space(profile: bytes) -> str:
    """The colour space of the pixels that a profile describes, such as `RGB`; of damaged data anything."""
    return profile[16:20].decode("latin-1").strip()


def keep_needed(profile: bytes) -> bytes | None:
    """Keep of a profile what converts colours to those of a screen.

    Args:
        profile: The profile as it is embedded.

    Returns:
        A smaller profile; None if the data are no profile of an image's colours.
    """
    if (
        not HEADER_BYTES < len(profile) <= MAX_BYTES
        or profile[36:40] != b"acsp"
        or profile[8] > MAX_VERSION
        or profile[12:16] not in DEVICE_CLASSES
        or profile[20:24] not in CONNECTION_SPACES
    ):
        return None
    kept: dict[bytes, bytes] = {}
    for index in range(min(_number(profile, HEADER_BYTES), MAX_TAGS)):
        entry = HEADER_BYTES + 4 + ENTRY_BYTES * index
        tag, start, size = (
            profile[entry : entry + 4],
            _number(profile, entry + 4),
            _number(profile, entry + 8),
        )
        content = profile[start : start + size]
        too_long = tag == b"desc" and size > MAX_TEXT_BYTES
        if len(content) == size and content[:4] in KEPT_TAGS.get(tag, ()) and not too_long:
            kept.setdefault(tag, content)
    return _join(profile[:HEADER_BYTES], kept)


def make(primaries: tuple[Chromaticity, ...], white: Chromaticity, curve: Curve) -> bytes | None:
    """Make the profile of an RGB space.

    Args:
        primaries: Of red, green and blue.
        white: Of equal amounts of the three.
        curve: From encoded values to light.

    Returns:
        The profile; None if there is no such space.
    """
    with np.errstate(all="ignore"):
        try:
            colorants = _colorants(primaries, white)
        except np.linalg.LinAlgError:
            return None
    if not np.abs(colorants).max() < 2**15:  # also if it is NaN; the range of the numbers in a profile
        return None
    light = np.clip(curve(np.linspace(0, 1, CURVE_POINTS)), 0, 1)
    table = b"curv" + bytes(4) + CURVE_POINTS.to_bytes(4, "big") + _rounded(light * 65_535, ">u2")
    tags = {
        tag: b"XYZ " + bytes(4) + _fixed(column)
        for tag, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colorants.T, strict=True)
    }
    header = b"".join(
        (
            bytes(8) + b"\x04\x30\0\0mntrRGB XYZ ",  # version 4.3
            bytes(12) + b"acsp" + bytes(28),  # date; platform, flags, maker, model, attributes, intent
            _fixed(D50),
            bytes(48),
        )
    )
    return _join(header, tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), table))


def _colorants(primaries: tuple[Chromaticity, ...], white: Chromaticity) -> NDArray[np.float64]:
    """The XYZ of each primary, a column each, adapted from its own white to that of profiles."""
    columns = np.array([_xyz(primary) for primary in primaries]).T
    white_xyz = _xyz(white)
    columns *= np.linalg.solve(columns, white_xyz)
    cones = BRADFORD @ D50 / (BRADFORD @ white_xyz)
    return np.asarray(np.linalg.inv(BRADFORD) @ np.diag(cones) @ BRADFORD @ columns)


def _xyz(chromaticity: Chromaticity) -> NDArray[np.float64]:
    """XYZ with Y = 1."""
    x, y = np.array(chromaticity, np.float64)
    return np.asarray(np.array([x, y, 1 - x - y]) / y)


def _join(header: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile with this header and these tags."""
    position = HEADER_BYTES + 4 + ENTRY_BYTES * len(tags)
    entries, contents = [len(tags).to_bytes(4, "big")], []
    for tag, content in tags.items():
        entries.append(tag + position.to_bytes(4, "big") + len(content).to_bytes(4, "big"))
        contents.append(content + bytes(-len(content) % 4))
        position += len(contents[-1])
    return b"".join([position.to_bytes(4, "big"), header[4:], *entries, *contents])


def _fixed(numbers: NDArray[np.float64]) -> bytes:
    return _rounded(numbers * 65_536, ">i4")


def _rounded(numbers: NDArray[np.float64], kind: str) -> bytes:
    rounded: NDArray[Any] = np.rint(numbers).astype(kind)
    return rounded.tobytes()


def _number(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "big")
