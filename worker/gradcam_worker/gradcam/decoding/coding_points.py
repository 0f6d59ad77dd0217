"""Colour spaces that a PNG gives by numbers: code points (cICP, ITU-T H.273), or gamma and chromaticities.

Each becomes an ICC profile, so that one converter serves all.
"""

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.decoding.icc_profile import Chromaticity, Curve, make

D65, ILLUMINANT_C, DCI_WHITE, EQUAL_ENERGY = (0.3127, 0.3290), (0.310, 0.316), (0.314, 0.351), (1 / 3, 1 / 3)
BT709_PRIMARIES = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
_SMPTE_170M = ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070))
_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
PRIMARIES: dict[int, tuple[tuple[Chromaticity, ...], Chromaticity]] = {  # code -> primaries, white
    1: (BT709_PRIMARIES, D65),
    4: (((0.67, 0.33), (0.21, 0.71), (0.14, 0.08)), ILLUMINANT_C),
    5: (((0.64, 0.33), (0.29, 0.60), (0.15, 0.06)), D65),
    6: (_SMPTE_170M, D65),
    7: (_SMPTE_170M, D65),
    8: (((0.681, 0.319), (0.243, 0.692), (0.145, 0.049)), ILLUMINANT_C),
    9: (((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)), D65),  # BT.2020
    11: (_P3, DCI_WHITE),
    12: (_P3, D65),
    22: (((0.630, 0.340), (0.295, 0.605), (0.155, 0.077)), D65),
}
GRAPHICS_WHITE, PEAK = (
    203,
    1000,
)  # cd/m2: the white of text in HDR video (ITU-R BT.2408), and its brightest light
HLG_WHITE_SIGNAL, HLG_SYSTEM_GAMMA = 0.75, 1.2  # the same white; of a display of that peak
TONE_KNEE = 1.65  # of the curve that compresses light above that white: fitted to what Chromium 156 shows
SRGB_ENCODING, SIGNIFICANT = (
    0.45455,
    0.05,
)  # gAMA that stands for sRGB; relative deviation that libpng takes seriously
GAMMA_UNIT = 100_000  # of the numbers in gAMA and cHRM
CHROMATICITIES = 8  # in cHRM: white, red, green, blue


def is_supported(points: bytes) -> bool:
    """Whether a cICP chunk (four bytes: primaries, transfer, matrix, full range) names a known RGB space."""
    primaries, transfer, matrix, full_range = points
    return primaries in PRIMARIES and transfer in TRANSFERS and (matrix, full_range) == (0, 1)


def from_cicp(points: bytes) -> bytes | None:
    """Make the profile of a cICP chunk.

    Args:
        points: The contents of the chunk, which `is_supported`.

    Returns:
        The profile.
    """
    primaries, transfer, _, _ = points
    return make(*PRIMARIES[primaries], TRANSFERS[transfer])


def from_gamma(gamma: bytes, chromaticities: bytes) -> bytes | None:
    """Make the profile of the chunks gAMA and cHRM.

    Args:
        gamma: The contents of gAMA.
        chromaticities: The contents of cHRM; empty: those of sRGB.

    Returns:
        The profile; None if the numbers describe no colours, or those of sRGB as older programs write them.
    """
    encoding = int.from_bytes(gamma, "big") / GAMMA_UNIT
    if not encoding or not (chromaticities or abs(encoding / SRGB_ENCODING - 1) > SIGNIFICANT):
        return None
    white: Chromaticity = D65
    primaries: tuple[Chromaticity, ...] = BT709_PRIMARIES
    if chromaticities:
        numbers = np.frombuffer(chromaticities, ">u4") / GAMMA_UNIT
        white, *rest = ((float(x), float(y)) for x, y in numbers.reshape(-1, 2))
        primaries = tuple(rest)
    return make(primaries, white, _power(1 / encoding))


def _power(exponent: float) -> Curve:
    return lambda values: values**exponent


def _smpte_240m(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(values < 0.0912, values / 4, ((values + 0.1115) / 1.1115) ** (1 / 0.45))  # noqa: PLR2004  # H.273


def _srgb(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)  # noqa: PLR2004  # IEC 61966-2-1


def _pq(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """SMPTE ST 2084."""
    root = values ** (32 / 2523)
    numerator, denominator = np.maximum(root - 0.8359375, 0), 18.8515625 - 18.6875 * root
    return _compress(10_000 / GRAPHICS_WHITE * (numerator / denominator) ** (16384 / 2610))


def _hlg(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """ARIB STD-B67, on a display."""

    def displayed(signal: NDArray[np.float64]) -> NDArray[np.float64]:
        upper = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
        return np.asarray(np.where(signal <= 0.5, signal**2 / 3, upper) ** HLG_SYSTEM_GAMMA)  # noqa: PLR2004  # BT.2100

    return _compress(displayed(values) / displayed(np.array(HLG_WHITE_SIGNAL)))


def _compress(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compress light, in units of the white of graphics, to that of a screen, as Chromium does.

    That white becomes half of the screen's; what is brighter follows a quadratic Bezier curve up to the peak.
    """
    square, linear = 1 - 2 * TONE_KNEE + PEAK / GRAPHICS_WHITE, 2 * (TONE_KNEE - 1)
    excess = np.clip(light, 1, PEAK / GRAPHICS_WHITE) - 1
    step = (np.sqrt(linear**2 + 4 * square * excess) - linear) / (2 * square)
    return np.where(light <= 1, light / 2, (1 - step) ** 2 / 2 + step * (1 - step) * TONE_KNEE + step**2)


TRANSFERS: dict[int, Curve] = {  # code -> curve
    1: _power(2.4),  # BT.1886, the display of BT.709 and BT.2020
    4: _power(2.2),
    5: _power(2.8),
    6: _power(2.4),
    7: _smpte_240m,
    8: _power(1),
    13: _srgb,
    14: _power(2.4),
    15: _power(2.4),
    16: _pq,
    17: lambda values: 52.37 / 48 * values**2.6,  # SMPTE ST 428-1
    18: _hlg,
}
