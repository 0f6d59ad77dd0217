"""Damaged images: detected, measured, and decoded or refused as the limits say."""

import io
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from gradcam_worker.errors import ImageDecodeFailed, UnsupportedMediaType
from gradcam_worker.gradcam.decoding import jpeg_file
from gradcam_worker.gradcam.decoding.decode import Decoded, Limits, decode

ANY_DAMAGE = Limits(max_damage=1)
ENCODINGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "optimized": {"optimize": True},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "progressive with restarts": {"progressive": True, "restart_marker_rows": 1},
}
END = b"\xff\xd9"


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def photo(photos: Path) -> Image.Image:
    with Image.open(photos / "chelsea.jpg") as opened:
        return opened.convert("RGB")


def is_detected(data: bytes) -> bool:
    try:
        return decode(data, ANY_DAMAGE).damage is not None
    except ImageDecodeFailed:
        return True


def share(data: bytes, limits: Limits = ANY_DAMAGE) -> float | None:
    damage = decode(data, limits).damage
    return damage.share if damage else None


class TestJpeg:
    @pytest.mark.parametrize("encoding", ENCODINGS)
    @pytest.mark.parametrize("end", [b"", END])
    @pytest.mark.parametrize("kept", [0.95, 0.9, 0.6])
    def test_the_missing_share_is_what_was_cut_off_with_or_without_an_end_marker(
        self, encoding: str, end: bytes, kept: float, photo: Image.Image
    ) -> None:
        complete = encode(photo, quality=85, **ENCODINGS[encoding])
        cut = complete[: int(len(complete) * kept)] + end
        missing = share(cut)
        assert missing
        assert (1 - kept) * 0.3 < missing <= (1 if "progressive" in encoding else (1 - kept) * 2)
        with pytest.raises(ImageDecodeFailed, match=r"About .*% of the image is missing; less than 1.0%"):
            decode(cut, Limits(max_damage=0.01))

    @pytest.mark.parametrize("encoding", ENCODINGS)
    @pytest.mark.parametrize(
        "damaged",
        [
            lambda data, position: data[:position] + data[position + 4096 :],
            lambda data, position: data[:position] + bytes(4096) + data[position + 4096 :],
            lambda data, position: data[:position] + data[position - 4096 :],
        ],
        ids=["a hole", "zeros", "a repeated piece"],
    )
    def test_damage_in_the_middle_is_detected(
        self, encoding: str, damaged: Callable[[bytes, int], bytes], photo: Image.Image
    ) -> None:
        complete = encode(photo, quality=85, **ENCODINGS[encoding])
        assert is_detected(damaged(complete, len(complete) // 2))

    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_scattered_changed_bytes_are_detected(self, encoding: str, photo: Image.Image) -> None:
        complete = bytearray(encode(photo, quality=85, **ENCODINGS[encoding]))
        rng = np.random.default_rng(7)
        for position in rng.integers(len(complete) // 3, len(complete) - 2, 40):
            complete[position] = rng.integers(0, 255)
        assert is_detected(bytes(complete))

    def test_a_progressive_jpeg_that_ends_between_two_scans_lacks_the_other_scans(
        self, photo: Image.Image
    ) -> None:
        complete = encode(photo, quality=85, progressive=True)
        scan = [match.start() for match in re.finditer(b"\xff\xda", complete)][-1]
        tables = complete.rindex(b"\xff\xc4", 0, scan)
        assert share(complete[:tables]) == pytest.approx(63 / 3 / 64)
        assert share(complete[: tables + 8] + END) == pytest.approx(63 / 3 / 64)

    def test_restart_intervals_that_are_missing_are_counted(self, photo: Image.Image) -> None:
        complete = encode(photo, quality=85, restart_marker_rows=1)
        marks = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", complete)]
        rows = len(marks) + 1
        assert share(complete[: marks[5]] + complete[marks[8] :]) == pytest.approx(3 / rows, abs=0.5 / rows)

    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_a_jpeg_that_was_transferred_as_text_is_refused(self, encoding: str, photo: Image.Image) -> None:
        complete = encode(photo, quality=85, **ENCODINGS[encoding])
        with pytest.raises(ImageDecodeFailed):
            decode(complete.replace(b"\n", b"\r\n"), ANY_DAMAGE)

    def test_without_its_last_two_bytes_the_image_is_complete(self, photo: Image.Image) -> None:
        complete = encode(photo, quality=85)
        decoded = decode(complete[:-2])
        assert decoded.damage
        assert (decoded.damage.share, decoded.damage.what) == (0, "its end marker is missing")
        assert (decoded.pixels == decode(complete).pixels).all()

    @pytest.mark.parametrize("encoding", ENCODINGS)
    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    def test_an_intact_jpeg_is_not_damaged_whatever_surrounds_its_pixels(
        self, encoding: str, mode: str, photo: Image.Image
    ) -> None:
        image = photo.convert(mode).resize((150, 100))
        exif = Image.Exif()
        exif[0x10F] = "A camera" * 100
        for quality in (5, 75, 100):
            metadata: dict[str, Any] = {
                "exif": exif,
                "icc_profile": bytes(100_000),
                "comment": b"\xff\xd9 and more",
            }
            complete = encode(image, quality=quality, **ENCODINGS[encoding], **metadata)
            for trailing in (b"", bytes(1000), b"\xff" * 9, encode(image)):
                decoded = decode(complete + trailing)
                assert decoded.damage is None
                with Image.open(io.BytesIO(complete)) as expected:
                    if mode != "CMYK":
                        assert (decoded.pixels == np.asarray(expected.convert("RGB"))).all()

    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_padding_before_the_end_marker_is_no_damage(self, encoding: str, photo: Image.Image) -> None:
        for image in (photo, photo.resize((40, 30))):
            complete = encode(image, quality=85, **ENCODINGS[encoding])
            pixels = decode(complete).pixels
            tenth = len(complete) // 10
            for padding in (bytes(9), bytes(tenth), b"\0\xff" * tenth, bytes(tenth) + b"\xff" * tenth):
                decoded = decode(complete[:-2] + padding + END)
                assert decoded.damage is None
                assert (decoded.pixels == pixels).all()
                unended = decode(complete[:-2] + padding)
                assert unended.damage
                assert (unended.damage.share, unended.damage.what) == (0, "its end marker is missing")

    @pytest.mark.parametrize(("seed", "last"), [(56, b"\xff\0"), (2190, b"\0")])
    def test_last_bytes_of_data_that_look_like_padding_are_kept(self, seed: int, last: bytes) -> None:
        noise = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
        complete = encode(Image.fromarray(noise), quality=40)
        assert complete.endswith(last + END)
        padded = decode(complete[:-2] + bytes(500) + END)
        assert padded.damage is None
        assert (padded.pixels == decode(complete).pixels).all()

    @pytest.mark.parametrize("encoding", ENCODINGS)
    @pytest.mark.parametrize("end", [b"", END])
    def test_zeros_that_replace_lost_data_are_no_padding(
        self, encoding: str, end: bytes, photo: Image.Image
    ) -> None:
        complete = encode(photo, quality=85, **ENCODINGS[encoding])
        kept = complete[: int(len(complete) * 0.3)]
        with pytest.raises(ImageDecodeFailed):
            decode(kept + bytes(len(complete) - len(kept) - 2) + end)

    def test_the_shipped_photos_and_a_file_of_two_images_are_intact(
        self, photos: Path, photo: Image.Image
    ) -> None:
        two = encode(photo, "MPO", save_all=True, append_images=[photo.resize((20, 20))])
        assert decode(two).damage is None
        assert [decode(path.read_bytes()).damage for path in sorted(photos.glob("*.jpg"))] == [None] * 5

    def test_a_jpeg_that_libjpeg_gives_up_on_is_refused_and_leaks_no_memory(self, photo: Image.Image) -> None:
        complete = bytearray(encode(photo, progressive=True))
        table = complete.rindex(b"\xff\xc4") + 5
        complete[table : table + 16] = b"\xff" * 16  # more codes than are possible
        with pytest.raises(ImageDecodeFailed, match="Bogus Huffman table definition"):
            decode(bytes(complete), ANY_DAMAGE)

    def test_nothing_is_written_to_standard_error(
        self, photo: Image.Image, capfd: pytest.CaptureFixture[str]
    ) -> None:
        complete = encode(photo)
        decode(complete[:-3000] + END, ANY_DAMAGE)
        assert capfd.readouterr() == ("", "")

    def test_junk_after_complete_data_changes_nothing(self, photo: Image.Image) -> None:
        for options in ENCODINGS.values():
            complete = encode(photo, **options)
            with_junk = jpeg_file.insert_junk(jpeg_file.read(complete).data)
            assert len(with_junk) > len(complete)
            with Image.open(io.BytesIO(with_junk)) as expected:
                assert (np.asarray(expected) == decode(complete).pixels).all()

    @pytest.mark.parametrize(("code", "name"), [(0xC5, "a hierarchical JPEG"), (0xC0, "a 12-bit JPEG")])
    def test_unsupported_kinds_are_named_in_the_error(self, code: int, name: str, photo: Image.Image) -> None:
        data = bytearray(encode(photo))
        position = data.index(b"\xff\xc0")
        data[position + 1], data[position + 4] = code, 12 if code == 0xC0 else 8
        with pytest.raises(UnsupportedMediaType, match=f"Received {name}, which is not read here"):
            decode(bytes(data))


def textured(mode: str) -> tuple[Image.Image, NDArray[np.uint8]]:
    """An image of noise, 200 x 120, which no codec can shorten, and its pixels as RGB."""
    noise = np.random.default_rng(3).integers(0, 256, (120, 200, 4), dtype=np.uint8)
    noise[..., 3] = 255
    image = Image.fromarray(noise)
    image = image if mode == "RGBA" else image.convert("RGB").convert(mode)
    return image, np.asarray(image.convert("RGB"))


class TestPng:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "L", "I;16"])
    @pytest.mark.parametrize("kept", [0.99, 0.7])
    def test_the_intact_rows_of_a_png_that_is_cut_off_are_decoded(self, mode: str, kept: float) -> None:
        image = textured("RGB" if mode == "I;16" else mode)[0]
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
        complete = encode(image, "PNG")
        before, after = decode(complete), decode(complete[: int(len(complete) * kept)], ANY_DAMAGE)
        assert after.damage
        assert after.damage.share == pytest.approx(1 - kept, abs=0.05)
        rows = int(120 * (1 - after.damage.share)) - 1
        assert (after.pixels[:rows] == before.pixels[:rows]).all()

    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_changed_pixel_data_are_refused(self, mode: str) -> None:
        complete = bytearray(encode(textured(mode)[0], "PNG"))
        complete[len(complete) // 2] ^= 0xFF
        with pytest.raises(ImageDecodeFailed, match=r"About .*% of the image is missing"):
            decode(bytes(complete))

    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_a_wrong_checksum_of_a_chunk_is_harmless_if_that_of_the_pixels_is_right(self, mode: str) -> None:
        image, pixels = textured(mode)
        complete = bytearray(encode(image, "PNG"))
        complete[-14] ^= 0xFF  # IEND is 12 bytes: the last of IDAT
        decoded = decode(bytes(complete))
        assert decoded.damage
        assert (decoded.damage.share, decoded.damage.what) == (0, "its pixel data are damaged")
        assert (decoded.pixels == pixels).all()

    def test_a_bomb_in_the_pixel_data_is_not_unpacked(self) -> None:
        complete = encode(Image.new("L", (4, 4)), "PNG")
        position = complete.index(b"IDAT") - 4
        body = zlib.compress(bytes(50_000_000))[:-1] + b"x"  # a wrong checksum, so that it is repaired
        chunk = len(body).to_bytes(4, "big") + b"IDAT" + body + zlib.crc32(b"IDAT" + body).to_bytes(4, "big")
        decoded = decode(complete[:position] + chunk + complete[-12:], ANY_DAMAGE)
        assert decoded.pixels.shape == (4, 4, 3)


class TestWebp:
    @pytest.mark.parametrize(
        ("mode", "lossless"), [("RGB", False), ("RGB", True), ("RGBA", False), ("RGBA", True)]
    )
    @pytest.mark.parametrize("animated", [False, True])
    def test_the_missing_share_is_what_was_cut_off(
        self, mode: str, *, lossless: bool, animated: bool
    ) -> None:
        image = textured(mode)[0]
        if mode == "RGBA":
            image.putpixel((0, 0), (1, 2, 3, 0))
        metadata: dict[str, Any] = {"save_all": True, "append_images": [Image.new(mode, (200, 120))]}
        complete = encode(image, "WEBP", lossless=lossless, **(metadata if animated else {}))
        end = complete.index(b"ANMF", complete.index(b"ANMF") + 4) if animated else len(complete)
        for kept in (0.98, 0.8):
            assert share(complete[: int(end * kept)]) == pytest.approx(1 - kept, abs=0.03)
        with pytest.raises(ImageDecodeFailed):
            decode(complete[: end // 4], ANY_DAMAGE)
        assert share(complete) is None

    def test_a_webp_that_was_transferred_as_text_is_refused_although_it_could_be_decoded(
        self,
    ) -> None:
        complete = encode(textured("RGB")[0], "WEBP", quality=95)
        with pytest.raises(ImageDecodeFailed, match="transferred as text"):
            decode(complete.replace(b"\n", b"\r\n"), ANY_DAMAGE)


class TestBmp:
    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
    def test_the_missing_share_is_what_was_cut_off(self, mode: str) -> None:
        complete = encode(textured(mode)[0], "BMP")
        assert share(complete[: int(len(complete) * 0.8)]) == pytest.approx(0.2, abs=0.02)
        with pytest.raises(ImageDecodeFailed):
            decode(complete[: int(len(complete) * 0.8)])


def test_damage_is_refused_from_the_limit_on(photo: Image.Image) -> None:
    cut = encode(photo, quality=85)[:-2]
    decoded = decode(cut, Limits(max_damage=0.001))
    assert isinstance(decoded, Decoded)
    less = encode(photo, quality=85)[:-300]
    with pytest.raises(ImageDecodeFailed, match=r"About .*% .*; less than 0.1% may be .*MAX_IMAGE_DAMAGE"):
        decode(less, Limits(max_damage=0.001))
    with pytest.raises(ImageDecodeFailed, match=r"About .*% .*; nothing may be .*MAX_IMAGE_DAMAGE"):
        decode(less, Limits(max_damage=0))


def test_the_colours_of_a_small_file_that_claims_many_pixels_are_not_converted(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = encode(photo.resize((96, 96)).convert("CMYK"))
    at = small.find(b"\xff\xc0") + 5
    claims_many = small[:at] + (2000).to_bytes(2, "big") * 2 + small[at + 4 :]
    converted: list[NDArray[np.uint8]] = []

    def convert(inks: NDArray[np.uint8]) -> NDArray[np.uint8]:
        converted.append(inks)
        return inks[..., :3]

    monkeypatch.setattr("gradcam_worker.gradcam.decoding.decode._from_cmyk", convert)
    with pytest.raises(ImageDecodeFailed, match=r"9\d\.\d% of the image is missing"):
        decode(claims_many)
    assert not converted
    decode(claims_many, ANY_DAMAGE)
    assert len(converted) == 1


def test_an_image_that_lacks_nothing_is_decoded_whatever_the_limit(photo: Image.Image) -> None:
    for cut in (encode(photo, quality=85)[:-2], encode(textured("RGB")[0], "PNG")[:-1]):
        damage = decode(cut, Limits(max_damage=0)).damage
        assert damage
        assert damage.share == 0


def test_a_png_that_was_transferred_as_text_is_named_in_the_error() -> None:
    with pytest.raises(UnsupportedMediaType, match="a PNG that was transferred as text"):
        decode(encode(textured("RGB")[0], "PNG").replace(b"\r\n", b"\n"))
