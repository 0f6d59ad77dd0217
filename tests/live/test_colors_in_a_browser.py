"""The colours that are explained are those that a browser shows."""

import base64
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from selenium import webdriver

from gradcam_worker.gradcam.decoding.coding_points import BT709_PRIMARIES, D65
from gradcam_worker.gradcam.decoding.decode import decode
from tests.gradcam.decoding.colored_files import (
    ADOBE,
    COLORS,
    DISPLAY_P3,
    P3,
    SRGB,
    bmp,
    chrm,
    cmyk_profile,
    deep_png,
    encode,
    gama,
    grey_profile,
    iccp,
    png,
)

pytestmark = pytest.mark.live

ROUNDING = 2  # levels

# Draws images on white, as <img> on a white page, and returns their pixels.
DRAW = """
const [addresses, done] = arguments;
Promise.all(addresses.map(async (address) => {
  const image = new Image();
  image.src = address;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d", {colorSpace: "srgb"});
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0);
  return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
})).then(done, (error) => done(String(error)));
"""
PHOTO = Image.fromarray(COLORS)
CLEAR = np.linspace(0, 255, COLORS[..., 0].size).astype(np.uint8).reshape(*COLORS.shape[:2], 1)
TRANSLUCENT = Image.fromarray(np.concatenate([COLORS, CLEAR], axis=2))
FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "png": ("png", lambda: png(COLORS)),
    "png-srgb": ("png", lambda: png(COLORS, iccp(SRGB))),
    "png-p3": ("png", lambda: png(COLORS, iccp(DISPLAY_P3))),
    "png-adobe": ("png", lambda: png(COLORS, iccp(ADOBE))),
    "png-p3-translucent": ("png", lambda: encode(TRANSLUCENT, "PNG", icc_profile=DISPLAY_P3)),
    "png-palette": ("png", lambda: encode(PHOTO.quantize(200), "PNG", icc_profile=ADOBE)),
    "png-grey": ("png", lambda: png(COLORS[..., 0], iccp(grey_profile(1.0)))),
    "png-grey-rgb-profile": ("png", lambda: png(COLORS[..., 0], iccp(DISPLAY_P3))),
    "png-rgb-grey-profile": ("png", lambda: png(COLORS, iccp(grey_profile(1.0)))),
    "png-gamma-1": ("png", lambda: png(COLORS, gama(1.0))),
    "png-gamma-2.2": ("png", lambda: png(COLORS, gama(1 / 2.2))),
    "png-gamma-1-chrm": ("png", lambda: png(COLORS, gama(1.0), chrm(D65, *BT709_PRIMARIES))),
    "png-gamma-2.2-chrm": ("png", lambda: png(COLORS, gama(1 / 2.2), chrm(D65, *BT709_PRIMARIES))),
    "png-gamma-2.2-p3": ("png", lambda: png(COLORS, gama(1 / 2.2), chrm(D65, *P3))),
    "png-chrm": ("png", lambda: png(COLORS, chrm(D65, *P3))),
    "png-srgb-chunk": ("png", lambda: png(COLORS, gama(1.0), chrm(D65, *P3), (b"sRGB", b"\0"))),
    "png-cicp-p3": ("png", lambda: png(COLORS, (b"cICP", bytes([12, 13, 0, 1])))),
    "png-cicp-and-icc": ("png", lambda: png(COLORS, (b"cICP", bytes([12, 13, 0, 1])), iccp(ADOBE))),
    "png-cicp-2020": ("png", lambda: png(COLORS, (b"cICP", bytes([9, 14, 0, 1])))),
    "png-16-bits": ("png", lambda: deep_png(COLORS, gama(1.0))),
    "jpeg-p3": ("jpeg", lambda: encode(PHOTO, "JPEG", quality=100, subsampling=0, icc_profile=DISPLAY_P3)),
    "jpeg-grey": (
        "jpeg",
        lambda: encode(PHOTO.convert("L"), "JPEG", quality=100, icc_profile=grey_profile(1.8)),
    ),
    "jpeg-grey-rgb-profile": (
        "jpeg",
        lambda: encode(PHOTO.convert("L"), "JPEG", quality=100, icc_profile=DISPLAY_P3),
    ),
    "jpeg-cmyk": (
        "jpeg",
        lambda: encode(PHOTO.convert("CMYK"), "JPEG", quality=100, subsampling=0, icc_profile=cmyk_profile()),
    ),
    "webp-p3": ("webp", lambda: encode(PHOTO, "WEBP", lossless=True, icc_profile=DISPLAY_P3)),
    "webp-p3-translucent": (
        "webp",
        lambda: encode(TRANSLUCENT, "WEBP", lossless=True, exact=True, icc_profile=DISPLAY_P3),
    ),
    "bmp-p3": ("bmp", lambda: bmp(COLORS, DISPLAY_P3)),
}


def test_the_colors_are_those_that_a_browser_shows(driver: webdriver.Chrome) -> None:
    driver.get("about:blank")
    files = {name: (kind, make_file()) for name, (kind, make_file) in FILES.items()}
    addresses = [
        f"data:image/{kind};base64,{base64.b64encode(data).decode()}" for kind, data in files.values()
    ]
    shown = driver.execute_async_script(DRAW, addresses)
    assert isinstance(shown, list), shown
    differences = {}
    for (name, (_, data)), values in zip(files.items(), shown, strict=True):
        pixels = decode(data).pixels
        seen: NDArray[np.int16] = np.array(values, np.int16).reshape(*pixels.shape[:2], 4)[..., :3]
        differences[name] = int(np.abs(pixels - seen).max())
    assert {name: difference for name, difference in differences.items() if difference > ROUNDING} == {}
