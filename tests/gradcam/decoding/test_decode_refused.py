import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import gradcam_worker
from gradcam_worker.errors import ImageDecodeFailed, ImagePixelsExceeded, UnsupportedMediaType
from gradcam_worker.gradcam.decoding.decode import BYTES_PER_PIXEL, Limits, decode
from gradcam_worker.gradcam.decoding.structure import Damage
from gradcam_worker.gradcam.decoding.webp_file import read as read_webp

# Decodes each file in turn and prints the result and the growth of the peak of memory. Not by `ru_maxrss`: a
# child process inherits the peak of the process that started it.
MEMORY_PROBE = """
import re, sys
from pathlib import Path
from gradcam_worker.errors import GradcamError
from gradcam_worker.gradcam.decoding.decode import decode

def peak_mb():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

for path in sys.argv[1:]:
    data, before = Path(path).read_bytes(), peak_mb()
    try:
        ending = str(decode(data).pixels.shape)
    except GradcamError as error:
        ending = error.code
    print(Path(path).name, ending, round(peak_mb() - before))
"""
FORMATS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> mode, format, options
    "jpeg": ("RGB", "JPEG", {}),
    "jpeg-progressive": ("RGB", "JPEG", {"progressive": True}),
    "jpeg-grey": ("L", "JPEG", {}),
    "jpeg-cmyk": ("CMYK", "JPEG", {}),
    "png": ("RGB", "PNG", {}),
    "png-alpha": ("RGBA", "PNG", {}),
    "png-palette": ("P", "PNG", {"transparency": 3}),
    "png-16-bit": ("I;16", "PNG", {}),
    "webp": ("RGB", "WEBP", {}),
    "webp-alpha": ("RGBA", "WEBP", {"lossless": True}),
    "gif": ("P", "GIF", {}),
    "gif-transparent": ("P", "GIF", {"transparency": 3}),
    "bmp": ("RGB", "BMP", {}),
    "bmp-alpha": ("RGBA", "BMP", {}),
}


def sample(name: str, width: int = 24, height: int = 20) -> bytes:
    """Noise in one of the FORMATS: no part of it can be missing unnoticed."""
    mode, kind, options = FORMATS[name]
    noise = np.random.default_rng(3).integers(0, 256, (height, width, 4), dtype=np.uint8)
    alpha = Image.fromarray(noise)
    image = Image.fromarray(noise[..., 0].astype(np.uint16) * 257) if mode == "I;16" else alpha
    file = io.BytesIO()
    (image if image.mode == mode else alpha.convert("RGB").convert(mode)).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes, claimed: int | None = None) -> bytes:
    """A chunk of a PNG, which may claim a wrong length."""
    length = len(data) if claimed is None else claimed
    return struct.pack(">I", length) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, chunk(b"IEND", b"")])


def gif(width: int, height: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00;"


def jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header lies about its size."""
    data = bytearray(sample("jpeg", 160, 160))
    position = data.index(b"\xff\xc0") + 5
    data[position : position + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def bombs() -> dict[str, bytes]:
    compressor = zlib.compressobj(9)
    rows = b"".join(compressor.compress(bytes(3751)) for _ in range(30_000)) + compressor.flush()
    pixel = chunk(b"IDAT", zlib.compress(b"\0\0"))
    return {
        "gif": gif(30_000, 30_000),
        "png": png(30_000, 30_000, chunk(b"IDAT", rows), depth=1),
        "jpeg": jpeg(30_000, 30_000),
        "png-lying-before": png(1, 1, chunk(b"zTXt", b"a\0\0", 2**31 - 1), pixel),
        "png-lying": png(1, 1, chunk(b"IDAT", zlib.compress(b"\0\0"), 2**31 - 1)),
        "png-lying-after": png(1, 1, pixel, chunk(b"tEXt", b"a", 2**31 - 1)),
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_no_image_takes_more_memory_than_is_reserved_for_it(tmp_path: Path) -> None:
    side, spare_mb = 1500, 4
    allowed_mb = side * side * BYTES_PER_PIXEL / 1024**2 + spare_mb
    for name in ("jpeg-progressive", "jpeg-cmyk", "png", "png-alpha", "webp-alpha", "gif-transparent"):
        small, large = tmp_path / f"{name}.small", tmp_path / f"{name}.large"
        small.write_bytes(sample(name))  # first, for memory that is allocated only once
        large.write_bytes(sample(name, side, side))
        command = [sys.executable, "-c", MEMORY_PROBE, str(small), str(large)]
        out = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout
        assert f"({side}, {side}, 3)" in out
        assert int(out.split()[-1]) < allowed_mb, out


def test_opencv_itself_refuses_images_far_above_the_limit() -> None:
    program = (
        "import sys; import numpy as np; import gradcam_worker.gradcam.imaging.overlay; import cv2\n"
        "cv2.imdecode(np.frombuffer(sys.stdin.buffer.read(), np.uint8), 1)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENCV")}
    bomb = png(16_385, 16_384, chunk(b"IDAT", b""), depth=1)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, check=False, input=bomb, timeout=60, env=environment)
    assert b"pixels <= CV_IO_MAX_IMAGE_PIXELS" in done.stderr


def test_only_one_module_calls_image_decoders() -> None:
    decoders = re.compile(
        r"\b(imdecode|imdecodemulti|imread|imreadmulti|VideoCapture|decode_jpeg|Image\.open)\("
    )
    modules = Path(gradcam_worker.__file__).parent.rglob("*.py")
    assert [path.name for path in modules if decoders.search(path.read_text("utf-8"))] == ["decode.py"]


class TestNotAnImage:
    @pytest.mark.parametrize(
        ("data", "expected"),
        [
            (b"", "an empty file"),
            (b"<!doctype html><html><body>404</body></html>", "a page of HTML or XML"),
            (b"\r\n  <html>", "a page of HTML or XML"),
            (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "a page of HTML or XML"),
            (b"%PDF-1.7\n", "a PDF document"),
            (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"an ISO media file \(heic\)"),
            (b"\0\0\0\x1cftypavif\0\0\0\0", r"an ISO media file \(avif\)"),
            (b"II*\0\x08\0\0\0", "a TIFF image"),
            (b"MM\0*\0\0\0\x08", "a TIFF image"),
            (b"PK\x03\x04\x14\0", "a ZIP archive"),
            (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
            (b"\xff\x0a\xfa\x1f", "a JPEG XL image"),
            (np.random.default_rng(5).bytes(400), "400 bytes that start with"),
        ],
    )
    def test_the_error_names_its_kind_and_the_supported_formats(self, data: bytes, expected: str) -> None:
        with pytest.raises(UnsupportedMediaType, match=f"Received {expected}.*: bmp, gif, jpeg, png, webp"):
            decode(data)

    def test_a_valid_tiff_is_refused_although_it_could_be_decoded(self) -> None:
        file = io.BytesIO()
        Image.new("RGB", (4, 4)).save(file, "TIFF")
        with pytest.raises(UnsupportedMediaType, match="TIFF"):
            decode(file.getvalue())


class TestCutOff:
    @pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
    @pytest.mark.parametrize("name", FORMATS)
    def test_part_of_an_image_is_damaged(self, name: str, kept: float) -> None:
        complete = sample(name, 64, 48)
        decode(complete)
        with pytest.raises(ImageDecodeFailed):
            decode(complete[: int(len(complete) * kept)])

    @pytest.mark.parametrize("name", FORMATS)
    def test_an_image_without_its_last_two_bytes_is_decoded_as_damaged(self, name: str) -> None:
        complete = sample(name, 64, 48)
        if name.startswith("gif"):
            with pytest.raises(ImageDecodeFailed):
                decode(complete[:-2])
            return
        expected, decoded = decode(complete), decode(complete[:-2])
        assert expected.damage is None
        assert decoded.damage
        assert decoded.damage.share < 0.01
        assert (decoded.pixels == expected.pixels).mean() > 0.9

    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_a_png_that_ends_between_two_chunks_is_damaged(self, mode: str) -> None:
        noise = np.random.default_rng(3).integers(0, 256, (160, 160, 4), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).convert(mode).save(file, "PNG")
        complete = file.getvalue()
        boundaries = [
            position - 4
            for position in range(len(complete))
            if complete[position : position + 4] in {b"IDAT", b"IEND"}
        ]
        assert len(boundaries) >= 3
        for boundary in boundaries[:-1]:
            with pytest.raises(ImageDecodeFailed, match=r"too early|cut off"):
                decode(complete[:boundary])
        decoded = decode(complete[: boundaries[-1]])
        assert decoded.damage == Damage(0, "it ends too early")
        assert (decoded.pixels == decode(complete).pixels).all()

    @pytest.mark.parametrize("name", ["jpeg", "png", "gif", "webp"])
    def test_data_that_start_like_an_image_are_damaged_and_not_of_an_unknown_kind(self, name: str) -> None:
        with pytest.raises(ImageDecodeFailed):
            decode(sample(name)[:12])


class TestTooLarge:
    @pytest.mark.parametrize("size", [(10_000, 6_401), (12_000, 12_000), (30_000, 30_000), (40_000, 2)])
    def test_the_header_is_enough_to_refuse_it_and_the_error_names_the_limits(
        self, size: tuple[int, int]
    ) -> None:
        for data in (png(*size, chunk(b"IDAT", b"")), gif(*size), jpeg(*size)):
            with pytest.raises(ImagePixelsExceeded, match="64,000,000 pixels and 32,767 a side"):
                decode(data)

    @pytest.mark.parametrize(("limits", "expected"), [((479, 99), "479 pixels"), ((999, 23), "23 a side")])
    def test_the_limits_can_be_set(self, limits: tuple[int, int], expected: str) -> None:
        with pytest.raises(ImagePixelsExceeded, match=rf"claims 24 x 20 pixels; at most .*{expected}"):
            decode(sample("png"), Limits(*limits))
        assert decode(sample("png"), Limits(max_pixels=480, max_side=24)).pixels.shape == (20, 24, 3)

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
    def test_bombs_are_refused_before_memory_is_allocated(self, tmp_path: Path) -> None:
        files = bombs()
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        command = [sys.executable, "-c", MEMORY_PROBE, *(str(tmp_path / name) for name in files)]
        out = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout
        lines = (re.fullmatch(r"(\S+) (.*) (\d+)", line) for line in out.splitlines())
        results = {line[1]: (line[2], int(line[3])) for line in lines if line}
        assert {name: code for name, (code, _) in results.items()} == {
            "gif": "image_pixels_exceeded",
            "png": "image_pixels_exceeded",
            "jpeg": "image_pixels_exceeded",
            "png-lying-before": "image_decode_failed",
            "png-lying": "(1, 1, 3)",  # its pixels are complete
            "png-lying-after": "(1, 1, 3)",
        }
        assert max(growth_mb for _, growth_mb in results.values()) < 100, out


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some damage
@pytest.mark.parametrize("name", FORMATS)
def test_any_damage_ends_in_an_image_or_a_typed_error(name: str) -> None:
    rng = np.random.default_rng(11)
    endings = set()
    for _ in range(45):
        data = bytearray(sample(name))
        for position in rng.integers(0, len(data) - 20, rng.integers(1, 6)):
            new, old = rng.integers(0, 4, 2).tolist()  # number of bytes
            data[position : position + old] = rng.bytes(new)
        try:
            pixels = decode(bytes(data)).pixels
        except (UnsupportedMediaType, ImagePixelsExceeded, ImageDecodeFailed) as error:
            endings.add(type(error))
        else:
            assert pixels.dtype == np.uint8
            assert pixels.shape[2:] == (3,)
    assert endings


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    decode(data)
    first = data.index(b"\xff\xda")
    scan = data[first:-2]
    with pytest.raises(ImageDecodeFailed, match="scans; at most 64 are read"):
        decode(data[:first] + scan * 65 + data[-2:])


@pytest.mark.parametrize("name", ["webp", "webp-alpha"])
@pytest.mark.parametrize("size", [(1, 1), (300, 7), (16_383, 2), (2, 16_383)])
def test_the_size_of_a_webp_is_read_without_decoding(name: str, size: tuple[int, int]) -> None:
    lossy, lossless, animated = io.BytesIO(), io.BytesIO(), io.BytesIO()
    mode = FORMATS[name][0]
    image = Image.new(mode, size)
    image.save(lossy, "WEBP")
    image.save(lossless, "WEBP", lossless=True)
    image.save(animated, "WEBP", save_all=True, append_images=[Image.new(mode, size, "red")])
    for file in (lossy, lossless, animated):
        assert read_webp(file.getvalue()).size == size


def test_a_webp_that_claims_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(
        buffer, "WEBP", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")]
    )
    animation = bytearray(buffer.getvalue())
    assert animation[12:16] == b"VP8X"
    animation[24:30] = b"\xff\x7f\0" * 2
    with pytest.raises(ImagePixelsExceeded, match="32768 x 32768"):
        decode(bytes(animation))
