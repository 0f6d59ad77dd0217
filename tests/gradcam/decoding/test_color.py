"""Colours become sRGB as Pillow's ImageCms converts them, and as the formulas of the standards say."""

import io
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from PIL import Image, ImageCms

from gradcam_worker.gradcam.decoding import color, icc_profile
from gradcam_worker.gradcam.decoding.coding_points import BT709_PRIMARIES, D65
from gradcam_worker.gradcam.decoding.decode import Decoded, Limits, decode
from gradcam_worker.gradcam.decoding.icc_profile import Chromaticity, Curve, make
from tests.gradcam.decoding.colored_files import (
    ADOBE,
    ADOBE_RGB,
    COLORS,
    DISPLAY_P3,
    P3,
    SRGB,
    bmp,
    chrm,
    chunk,
    cmyk_profile,
    deep_png,
    encode,
    gama,
    gamma,
    grey_profile,
    iccp,
    named,
    png,
    srgb_curve,
    with_tag,
)

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]

ROUNDING = 1  # levels
P3_CICP = bytes([12, 13, 0, 1])
HLG_LEVELS = {0: 0, 64: 43, 130: 101, 190: 185, 214: 218, 238: 241, 255: 255}
HOSTILE_NAME = 'x\n{"event": "forged"}\x1b[2J'


def by_pillow(image: Image.Image, profile: bytes) -> NDArray[np.int16]:
    """What Pillow's own conversion makes of it, with the whole profile."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    target = ImageCms.ImageCmsProfile(io.BytesIO(SRGB))
    converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    assert converted
    return np.asarray(converted, np.int16)


def by_formula(pixels: Pixels, primaries: tuple[Chromaticity, ...], curve: Curve) -> Floats:
    """The definition: light by the curve, other primaries by a matrix (the white stays), clipped, encoded."""

    def matrix(primaries: tuple[Chromaticity, ...]) -> Floats:
        columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
        x, y = D65
        return np.asarray(columns * np.linalg.solve(columns, [x / y, 1, (1 - x - y) / y]))

    light = curve(pixels / 255) @ (np.linalg.inv(matrix(BT709_PRIMARIES)) @ matrix(primaries)).T
    light = np.clip(light, 0, 1)
    return np.asarray(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055))


def source_of(decoded: Decoded) -> tuple[str, str] | None:
    return (decoded.converted_from.kind, decoded.converted_from.name) if decoded.converted_from else None


class TestProfiles:
    @pytest.mark.parametrize(
        ("profile", "primaries", "curve", "name"),
        [
            (DISPLAY_P3, P3, srgb_curve, "Display P3"),
            (ADOBE, ADOBE_RGB, gamma(563 / 256), "Adobe RGB (1998)"),
        ],
    )
    def test_a_profile_is_applied_as_pillow_and_the_formula_apply_it(
        self, profile: bytes, primaries: tuple[Chromaticity, ...], curve: Curve, name: str
    ) -> None:
        decoded = decode(png(COLORS, iccp(profile)))
        assert_allclose(decoded.pixels, by_pillow(Image.fromarray(COLORS), profile), atol=ROUNDING)
        assert_allclose(decoded.pixels, by_formula(COLORS, primaries, curve), atol=ROUNDING + 0.5)
        assert source_of(decoded) == ("icc", name)
        assert np.abs(decoded.pixels.astype(int) - COLORS).max() > 30

    @pytest.mark.parametrize(
        "make_file",
        [
            lambda profile: encode(
                Image.fromarray(COLORS), "JPEG", quality=100, subsampling=0, icc_profile=profile
            ),
            lambda profile: encode(Image.fromarray(COLORS), "WEBP", lossless=True, icc_profile=profile),
            lambda profile: encode(Image.fromarray(COLORS), "WEBP", quality=100, icc_profile=profile),
            lambda profile: bmp(COLORS, profile),
        ],
        ids=["jpeg", "webp-lossless", "webp", "bmp"],
    )
    def test_every_format_that_carries_a_profile_is_converted(
        self, make_file: Callable[[bytes], bytes]
    ) -> None:
        data = make_file(DISPLAY_P3)
        stored = decode(data, Limits(convert_colors=False))
        assert source_of(stored) is None
        decoded = decode(data)
        assert_allclose(decoded.pixels, by_pillow(Image.fromarray(stored.pixels), DISPLAY_P3), atol=ROUNDING)
        assert source_of(decoded) == ("icc", "Display P3")

    def test_segments_of_a_jpeg_are_joined_in_the_order_of_their_numbers(self) -> None:
        long = with_tag(DISPLAY_P3, b"priv", bytes(150_000))
        data = encode(Image.fromarray(COLORS), "JPEG", quality=100, subsampling=0, icc_profile=long)
        first, second, third = (data.index(b"ICC_PROFILE\0" + bytes([number, 3])) - 4 for number in (1, 2, 3))
        end = third + 2 + int.from_bytes(data[third + 2 : third + 4], "big")
        swapped = data[:first] + data[third:end] + data[first:third] + data[end:]
        missing = data[:second] + data[third:]
        expected = decode(data)
        assert source_of(expected) == ("icc", "Display P3")
        assert_array_equal(decode(swapped).pixels, expected.pixels)
        assert source_of(decode(missing)) is None
        assert_array_equal(decode(missing).pixels, decode(data, Limits(convert_colors=False)).pixels)

    @pytest.mark.parametrize(
        "profile",
        [SRGB, named(make(BT709_PRIMARIES, D65, srgb_curve), "any"), with_tag(SRGB, b"priv", bytes(70_000))],
        ids=["pillow", "table", "long"],
    )
    def test_a_profile_of_srgb_changes_nothing(self, profile: bytes) -> None:
        decoded = decode(png(COLORS, iccp(profile)))
        assert source_of(decoded) is None
        assert_array_equal(decoded.pixels, COLORS)

    @pytest.mark.parametrize("mode", ["L", "LA"])
    def test_a_grey_profile_converts_grey_images(self, mode: str) -> None:
        greys = COLORS[..., 0]
        decoded = decode(png(greys, iccp(grey_profile(1.0)), mode=mode))
        expected = by_formula(COLORS[..., :1].repeat(3, axis=2), BT709_PRIMARIES, gamma(1.0))
        assert_allclose(decoded.pixels, expected, atol=ROUNDING + 0.5)
        assert source_of(decoded) == ("icc", "")

    def test_a_grey_jpeg_stays_grey(self) -> None:
        image = Image.fromarray(COLORS[..., 0])
        data = encode(image, "JPEG", quality=100, icc_profile=grey_profile(1.8))
        pixels = decode(data).pixels
        assert_array_equal(pixels, pixels[..., :1].repeat(3, axis=2))
        stored = decode(data, Limits(convert_colors=False)).pixels
        assert_allclose(pixels, by_formula(stored, BT709_PRIMARIES, gamma(1.8)), atol=ROUNDING + 0.5)

    def test_inks_are_converted_by_their_profile(self) -> None:
        image = Image.fromarray(COLORS).convert("CMYK")
        data = encode(image, "JPEG", quality=100, subsampling=0, icc_profile=cmyk_profile())
        with Image.open(io.BytesIO(data)) as stored:
            expected = by_pillow(stored, cmyk_profile())
        decoded = decode(data)
        assert np.abs(decoded.pixels - expected).mean() < 1
        assert source_of(decoded) == ("icc", "")
        assert np.abs(expected - COLORS).mean() > 30


class TestChunksOfAPng:
    @pytest.mark.parametrize("encoding", [1.0, 1 / 2.4, 1 / 1.8, 0.3])
    def test_gamma_is_applied(self, encoding: float) -> None:
        decoded = decode(png(COLORS, gama(encoding)))
        expected = by_formula(COLORS, BT709_PRIMARIES, gamma(1 / encoding))
        assert_allclose(decoded.pixels, expected, atol=ROUNDING + 0.5)
        assert source_of(decoded) == ("gamma", f"{1 / encoding:.3g}")

    @pytest.mark.parametrize("encoding", [0.45455, 0.45, 0.46])
    def test_the_gamma_that_programs_write_for_srgb_changes_nothing(self, encoding: float) -> None:
        decoded = decode(png(COLORS, gama(encoding)))
        assert source_of(decoded) is None
        assert_array_equal(decoded.pixels, COLORS)

    def test_gamma_is_applied_with_the_primaries_of_the_image(self) -> None:
        decoded = decode(png(COLORS, gama(1 / 2.2), chrm(D65, *P3)))
        assert_allclose(decoded.pixels, by_formula(COLORS, P3, gamma(2.2)), atol=ROUNDING + 0.5)
        assert source_of(decoded) == ("gamma", "2.2 with its own primaries")

    @pytest.mark.parametrize("mode", ["1", "L", "P"])
    def test_gamma_is_applied_to_grey_and_to_palettes(self, mode: str) -> None:
        image = Image.fromarray(COLORS).convert(mode)
        data = encode(image, "PNG")
        chunk_of_gamma = chunk(*gama(1.0))
        stored = np.asarray(image.convert("RGB"))
        decoded = decode(data[:33] + chunk_of_gamma + data[33:])
        assert_allclose(decoded.pixels, by_formula(stored, BT709_PRIMARIES, gamma(1.0)), atol=ROUNDING + 0.5)

    def test_gamma_is_applied_to_sixteen_bits(self) -> None:
        assert_array_equal(decode(deep_png(COLORS, gama(1.0))).pixels, decode(png(COLORS, gama(1.0))).pixels)

    def test_code_points_are_applied(self) -> None:
        decoded = decode(png(COLORS, (b"cICP", P3_CICP)))
        assert_allclose(decoded.pixels, by_formula(COLORS, P3, srgb_curve), atol=ROUNDING + 0.5)
        assert source_of(decoded) == ("cicp", "12/13/0/1")

    def test_the_code_points_of_srgb_change_nothing(self) -> None:
        decoded = decode(png(COLORS, (b"cICP", bytes([1, 13, 0, 1]))))
        assert source_of(decoded) is None
        assert_array_equal(decoded.pixels, COLORS)

    @pytest.mark.parametrize(
        ("transfer", "levels"),
        [(16, {0: 0, 64: 30, 148: 187, 166: 223, 184: 246, 200: 255, 255: 255}), (18, HLG_LEVELS)],
        ids=["PQ", "HLG"],
    )
    def test_bright_light_is_compressed_as_chromium_compresses_it(
        self, transfer: int, levels: dict[int, int]
    ) -> None:
        ramp = np.array([*levels], np.uint8)[np.newaxis, :, np.newaxis].repeat(3, axis=2)
        pixels = decode(png(ramp, (b"cICP", bytes([9, transfer, 0, 1])))).pixels
        expected = np.array([*levels.values()])[np.newaxis, :, np.newaxis]
        assert_allclose(pixels, np.broadcast_to(expected, ramp.shape), atol=2)

    @pytest.mark.parametrize(
        ("chunks", "kind"),
        [
            ([iccp(ADOBE), gama(1.0), (b"cICP", P3_CICP), (b"sRGB", b"\0")], "cicp"),
            ([gama(1.0), (b"sRGB", b"\0"), iccp(ADOBE)], "icc"),
            ([gama(1.0), chrm(D65, *P3), (b"sRGB", b"\0")], None),
            ([chrm(D65, *P3)], None),
            ([(b"cICP", bytes([12, 13, 1, 1])), iccp(ADOBE)], "icc"),  # a matrix: no RGB
            ([(b"cICP", bytes([12, 13, 0, 0])), iccp(ADOBE)], "icc"),  # of a narrow range
            ([(b"cICP", bytes([12, 99, 0, 1])), gama(1.0)], "gamma"),
            ([(b"iCCP", b"any\0\0no deflate"), gama(1.0)], "gamma"),
            ([(b"iCCP", b"any\0\1" + zlib.compress(ADOBE)), gama(1.0)], "gamma"),
            ([(b"gAMA", bytes(4))], None),
            ([(b"gAMA", bytes(3))], None),
            ([gama(1.0), chrm((0, 0), *P3)], None),
            ([gama(1.0), chrm(D65, (0.3, 0.3), (0.3, 0.3), (0.3, 0.3))], None),
        ],
    )
    def test_the_first_that_the_standard_ranks_counts(
        self, chunks: list[tuple[bytes, bytes]], kind: str | None
    ) -> None:
        source = source_of(decode(png(COLORS, *chunks)))
        assert (source and source[0]) == kind

    def test_a_chunk_with_a_wrong_checksum_is_ignored(self) -> None:
        data = png(COLORS)
        broken = bytearray(chunk(*gama(1.0)))
        broken[-1] ^= 1
        assert source_of(decode(data[:33] + bytes(broken) + data[33:])) is None

    def test_a_chunk_behind_the_pixels_is_ignored(self) -> None:
        data = png(COLORS)
        assert source_of(decode(data[:-12] + chunk(*gama(1.0)) + data[-12:])) is None


class TestTranslucent:
    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_colors_are_converted_before_they_are_laid_on_white(self, kind: str) -> None:
        alpha = np.linspace(0, 255, COLORS[..., 0].size).astype(np.uint8).reshape(*COLORS.shape[:2], 1)
        image = Image.fromarray(np.concatenate([COLORS, alpha], axis=2))
        options: dict[str, Any] = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        decoded = decode(encode(image, kind, icc_profile=DISPLAY_P3, **options))
        share = alpha / 255
        expected = share * by_formula(COLORS, P3, srgb_curve) + (1 - share) * 255
        assert_allclose(decoded.pixels, expected, atol=ROUNDING + 1)

    def test_a_palette_with_transparent_entries_is_converted(self) -> None:
        image = Image.fromarray(COLORS).quantize(256)
        clear = image.getpixel((0, 0))
        data = encode(image, "PNG", icc_profile=ADOBE, transparency=clear)
        expected = by_formula(np.asarray(image.convert("RGB")), ADOBE_RGB, gamma(563 / 256))
        expected[np.asarray(image) == clear] = 255
        assert_allclose(decode(data).pixels, expected, atol=ROUNDING + 1)


class TestNothingFails:
    @pytest.mark.parametrize(
        ("pixels", "profile"),
        [
            (COLORS[..., 0], named(DISPLAY_P3, HOSTILE_NAME)),
            (COLORS, grey_profile(1.0)),
            (COLORS, cmyk_profile()),
        ],
        ids=["grey", "rgb", "inks"],
    )
    def test_a_profile_of_another_color_space_is_ignored_in_silence(
        self, pixels: Pixels, profile: bytes, capfd: pytest.CaptureFixture[str]
    ) -> None:
        expected = pixels if pixels.ndim == 3 else pixels[..., np.newaxis].repeat(3, axis=2)
        decoded = decode(png(pixels, iccp(profile, HOSTILE_NAME.encode())))
        assert_array_equal(decoded.pixels, expected)
        jpeg = encode(Image.fromarray(pixels), "JPEG", icc_profile=profile)
        assert source_of(decoded) is source_of(decode(jpeg)) is None
        assert capfd.readouterr() == ("", "")

    def test_a_name_is_printable_and_short(self) -> None:
        plain = make(P3, D65, srgb_curve)
        source = source_of(decode(png(COLORS, iccp(named(plain, HOSTILE_NAME + "y" * 500)))))
        assert source
        assert source[1].startswith(r'x\n{"event": "forged"}\x1b[2J')
        assert source[1].isprintable()
        assert len(source[1]) < 150

    def test_a_damaged_profile_is_ignored_or_applied_but_the_image_is_read(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        random = np.random.default_rng(0)
        for profile in (DISPLAY_P3, cmyk_profile(), grey_profile(2.0)):
            for _ in range(60):
                damaged = bytearray(profile)
                for position in random.integers(0, len(profile), 4):
                    damaged[position] = random.integers(256)
                for position in random.integers(0, min(len(profile), 260), 2):
                    damaged[position] = random.integers(256)
                cut = damaged[: random.integers(len(damaged))] if random.integers(2) else damaged
                assert decode(png(COLORS, iccp(bytes(cut)))).pixels.shape == COLORS.shape
        assert capfd.readouterr() == ("", "")

    def test_a_profile_that_asks_for_half_a_million_matrices_is_not_obeyed(self) -> None:
        count = 300_000
        matrix = b"matf" + bytes(4) + struct.pack(">HH12f", 3, 3, *np.eye(3).ravel(), 0, 0, 0)
        head = b"mpet" + bytes(4) + struct.pack(">HHI", 3, 3, count)
        entry = struct.pack(">II", len(head) + 8 * count, len(matrix))
        profile = with_tag(DISPLAY_P3, b"D2B0", head + entry * count + matrix)
        assert len(profile) < icc_profile.MAX_BYTES
        kept = icc_profile.keep_needed(profile)
        assert kept
        assert len(kept) < 30_000
        assert_array_equal(
            decode(png(COLORS, iccp(profile))).pixels, decode(png(COLORS, iccp(DISPLAY_P3))).pixels
        )

    def test_a_profile_that_unpacks_to_more_than_is_allowed_is_ignored(self) -> None:
        bomb = with_tag(DISPLAY_P3, b"priv", bytes(200 * 1024**2))
        assert source_of(decode(png(COLORS, iccp(bomb)))) is None

    def test_only_so_many_conversions_are_kept(self) -> None:
        for number in range(2 * color.MAX_KEPT):
            decode(png(COLORS, gama(0.2 + number / 1000)))
        assert len(color._kept) == color.MAX_KEPT

    def test_threads_share_a_conversion(self) -> None:
        data = png(COLORS, gama(0.7))
        expected = decode(data).pixels
        with ThreadPoolExecutor(8) as threads:
            for decoded in threads.map(decode, [data] * 64):
                assert_array_equal(decoded.pixels, expected)
