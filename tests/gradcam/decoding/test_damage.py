"""Damaged pictures: seen, measured, and explained or refused as the operator says."""

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

ANY = Limits(max_damage=1)
WAYS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "optimized": {"optimize": True},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "progressive with restarts": {"progressive": True, "restart_marker_rows": 1},
}
END = b"\xff\xd9"


def saved(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def photo(photos: Path) -> Image.Image:
    with Image.open(photos / "chelsea.jpg") as opened:
        return opened.convert("RGB")


def is_seen(data: bytes) -> bool:
    try:
        return decode(data, ANY).damage is not None
    except ImageDecodeFailed:
        return True


def share(data: bytes, limits: Limits = ANY) -> float | None:
    damage = decode(data, limits).damage
    return damage.share if damage else None


class TestJpeg:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("end", [b"", END])
    @pytest.mark.parametrize("kept", [0.95, 0.9, 0.6])
    def test_one_that_is_cut_off_lacks_as_much_as_was_cut_whether_or_not_an_end_marker_stands_there(
        self, way: str, end: bytes, kept: float, photo: Image.Image
    ) -> None:
        whole = saved(photo, quality=85, **WAYS[way])
        cut = whole[: int(len(whole) * kept)] + end
        found = share(cut)
        assert found
        assert (1 - kept) * 0.3 < found <= (1 if "progressive" in way else (1 - kept) * 2)
        with pytest.raises(ImageDecodeFailed, match=r"About .*% of the picture is missing; less than 1.0%"):
            decode(cut, Limits(max_damage=0.01))

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize(
        "damaged",
        [
            lambda data, at: data[:at] + data[at + 4096 :],
            lambda data, at: data[:at] + bytes(4096) + data[at + 4096 :],
            lambda data, at: data[:at] + data[at - 4096 :],
        ],
        ids=["a hole", "zeros", "a piece that comes twice"],
    )
    def test_damage_in_the_middle_is_seen(
        self, way: str, damaged: Callable[[bytes, int], bytes], photo: Image.Image
    ) -> None:
        whole = saved(photo, quality=85, **WAYS[way])
        assert is_seen(damaged(whole, len(whole) // 2))

    @pytest.mark.parametrize("way", WAYS)
    def test_bytes_that_were_changed_here_and_there_are_seen(self, way: str, photo: Image.Image) -> None:
        whole = bytearray(saved(photo, quality=85, **WAYS[way]))
        rng = np.random.default_rng(7)
        for at in rng.integers(len(whole) // 3, len(whole) - 2, 40):
            whole[at] = rng.integers(0, 255)
        assert is_seen(bytes(whole))

    def test_a_progressive_one_that_ends_between_two_scans_lacks_what_the_others_hold(
        self, photo: Image.Image
    ) -> None:
        whole = saved(photo, quality=85, progressive=True)
        scan = [found.start() for found in re.finditer(b"\xff\xda", whole)][-1]
        tables = whole.rindex(b"\xff\xc4", 0, scan)
        assert share(whole[:tables]) == pytest.approx(63 / 3 / 64)
        assert share(whole[: tables + 8] + END) == pytest.approx(63 / 3 / 64)

    def test_restart_intervals_that_are_missing_are_counted(self, photo: Image.Image) -> None:
        whole = saved(photo, quality=85, restart_marker_rows=1)
        marks = [found.start() for found in re.finditer(rb"\xff[\xd0-\xd7]", whole)]
        rows = len(marks) + 1
        assert share(whole[: marks[5]] + whole[marks[8] :]) == pytest.approx(3 / rows, abs=0.5 / rows)

    @pytest.mark.parametrize("way", WAYS)
    def test_one_that_was_transferred_as_text_is_nothing_but_damage(
        self, way: str, photo: Image.Image
    ) -> None:
        whole = saved(photo, quality=85, **WAYS[way])
        with pytest.raises(ImageDecodeFailed):
            decode(whole.replace(b"\n", b"\r\n"), ANY)

    def test_one_without_its_last_two_bytes_is_the_whole_picture(self, photo: Image.Image) -> None:
        whole = saved(photo, quality=85)
        decoded = decode(whole[:-2])
        assert decoded.damage
        assert (decoded.damage.share, decoded.damage.what) == (0, "its end marker is missing")
        assert (decoded.pixels == decode(whole).pixels).all()

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
    def test_a_good_one_is_no_damaged_one_whatever_stands_around_its_pixels(
        self, way: str, mode: str, photo: Image.Image
    ) -> None:
        picture = photo.convert(mode).resize((150, 100))
        exif = Image.Exif()
        exif[0x10F] = "A camera" * 100
        for quality in (5, 75, 100):
            more: dict[str, Any] = {
                "exif": exif,
                "icc_profile": bytes(100_000),
                "comment": b"\xff\xd9 and more",
            }
            whole = saved(picture, quality=quality, **WAYS[way], **more)
            for behind in (b"", bytes(1000), b"\xff" * 9, saved(picture)):
                decoded = decode(whole + behind)
                assert decoded.damage is None
                with Image.open(io.BytesIO(whole)) as other:
                    if mode != "CMYK":
                        assert (decoded.pixels == np.asarray(other.convert("RGB"))).all()

    @pytest.mark.parametrize("way", WAYS)
    def test_padding_before_the_end_marker_is_no_damage(self, way: str, photo: Image.Image) -> None:
        for picture in (photo, photo.resize((40, 30))):
            whole = saved(picture, quality=85, **WAYS[way])
            pixels = decode(whole).pixels
            tenth = len(whole) // 10
            for padding in (bytes(9), bytes(tenth), b"\0\xff" * tenth, bytes(tenth) + b"\xff" * tenth):
                decoded = decode(whole[:-2] + padding + END)
                assert decoded.damage is None
                assert (decoded.pixels == pixels).all()
                unended = decode(whole[:-2] + padding)
                assert unended.damage
                assert (unended.damage.share, unended.damage.what) == (0, "its end marker is missing")

    @pytest.mark.parametrize(("seed", "last"), [(56, b"\xff\0"), (2190, b"\0")])
    def test_last_bytes_of_data_that_look_like_padding_are_kept(self, seed: int, last: bytes) -> None:
        noise = np.random.default_rng(seed).integers(0, 256, (8, 8), np.uint8)
        whole = saved(Image.fromarray(noise), quality=40)
        assert whole.endswith(last + END)
        padded = decode(whole[:-2] + bytes(500) + END)
        assert padded.damage is None
        assert (padded.pixels == decode(whole).pixels).all()

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("end", [b"", END])
    def test_zeros_in_place_of_lost_data_are_no_padding(
        self, way: str, end: bytes, photo: Image.Image
    ) -> None:
        whole = saved(photo, quality=85, **WAYS[way])
        kept = whole[: int(len(whole) * 0.3)]
        with pytest.raises(ImageDecodeFailed):
            decode(kept + bytes(len(whole) - len(kept) - 2) + end)

    def test_the_shipped_photos_and_a_file_of_two_pictures_are_whole(
        self, photos: Path, photo: Image.Image
    ) -> None:
        two = saved(photo, "MPO", save_all=True, append_images=[photo.resize((20, 20))])
        assert decode(two).damage is None
        assert [decode(path.read_bytes()).damage for path in sorted(photos.glob("*.jpg"))] == [None] * 5

    def test_what_libjpeg_gives_up_on_is_refused_and_no_memory_is_shown(self, photo: Image.Image) -> None:
        whole = bytearray(saved(photo, progressive=True))
        table = whole.rindex(b"\xff\xc4") + 5
        whole[table : table + 16] = b"\xff" * 16  # more codes than there can be
        with pytest.raises(ImageDecodeFailed, match="Bogus Huffman table definition"):
            decode(bytes(whole), ANY)

    def test_nothing_is_written_to_standard_error(
        self, photo: Image.Image, capfd: pytest.CaptureFixture[str]
    ) -> None:
        whole = saved(photo)
        decode(whole[:-3000] + END, ANY)
        assert capfd.readouterr() == ("", "")

    def test_junk_behind_whole_data_changes_nothing(self, photo: Image.Image) -> None:
        for options in WAYS.values():
            whole = saved(photo, **options)
            with_junk = jpeg_file.with_junk(jpeg_file.read(whole).data)
            assert len(with_junk) > len(whole)
            with Image.open(io.BytesIO(with_junk)) as other:
                assert (np.asarray(other) == decode(whole).pixels).all()

    @pytest.mark.parametrize(("code", "said"), [(0xC5, "a hierarchical JPEG"), (0xC0, "a 12-bit JPEG")])
    def test_kinds_that_are_not_read_here_are_refused_by_their_names(
        self, code: int, said: str, photo: Image.Image
    ) -> None:
        data = bytearray(saved(photo))
        at = data.index(b"\xff\xc0")
        data[at + 1], data[at + 4] = code, 12 if code == 0xC0 else 8
        with pytest.raises(UnsupportedMediaType, match=f"Received {said}, which is not read here"):
            decode(bytes(data))


def textured(mode: str) -> tuple[Image.Image, NDArray[np.uint8]]:
    """A picture of 200 x 120 that no codec can leave anything of out, and its pixels as RGB."""
    noise = np.random.default_rng(3).integers(0, 256, (120, 200, 4), dtype=np.uint8)
    noise[..., 3] = 255
    picture = Image.fromarray(noise)
    picture = picture if mode == "RGBA" else picture.convert("RGB").convert(mode)
    return picture, np.asarray(picture.convert("RGB"))


class TestPng:
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "L", "I;16"])
    @pytest.mark.parametrize("kept", [0.99, 0.7])
    def test_what_is_there_of_one_that_is_cut_off_is_shown(self, mode: str, kept: float) -> None:
        picture = textured("RGB" if mode == "I;16" else mode)[0]
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(picture)[..., 0].astype(np.uint16) * 257)
        whole = saved(picture, "PNG")
        before, after = decode(whole), decode(whole[: int(len(whole) * kept)], ANY)
        assert after.damage
        assert after.damage.share == pytest.approx(1 - kept, abs=0.05)
        rows = int(120 * (1 - after.damage.share)) - 1
        assert (after.pixels[:rows] == before.pixels[:rows]).all()

    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_pixels_that_are_not_as_they_were_written_are_not_shown(self, mode: str) -> None:
        whole = bytearray(saved(textured(mode)[0], "PNG"))
        whole[len(whole) // 2] ^= 0xFF
        with pytest.raises(ImageDecodeFailed, match=r"About .*% of the picture is missing"):
            decode(bytes(whole))

    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_a_wrong_checksum_of_a_chunk_costs_nothing_where_that_of_the_pixels_is_right(
        self, mode: str
    ) -> None:
        picture, pixels = textured(mode)
        whole = bytearray(saved(picture, "PNG"))
        whole[-14] ^= 0xFF  # IEND is 12 bytes: the last of IDAT
        decoded = decode(bytes(whole))
        assert decoded.damage
        assert (decoded.damage.share, decoded.damage.what) == (0, "its pixel data are damaged")
        assert (decoded.pixels == pixels).all()

    def test_a_bomb_in_its_pixel_data_is_not_unpacked(self) -> None:
        whole = saved(Image.new("L", (4, 4)), "PNG")
        at = whole.index(b"IDAT") - 4
        body = zlib.compress(bytes(50_000_000))[:-1] + b"x"  # a wrong checksum, so that it is looked at
        chunk = len(body).to_bytes(4, "big") + b"IDAT" + body + zlib.crc32(b"IDAT" + body).to_bytes(4, "big")
        decoded = decode(whole[:at] + chunk + whole[-12:], ANY)
        assert decoded.pixels.shape == (4, 4, 3)


class TestWebp:
    @pytest.mark.parametrize(
        ("mode", "lossless"), [("RGB", False), ("RGB", True), ("RGBA", False), ("RGBA", True)]
    )
    @pytest.mark.parametrize("animated", [False, True])
    def test_one_that_is_cut_off_lacks_what_its_header_promises(
        self, mode: str, *, lossless: bool, animated: bool
    ) -> None:
        picture = textured(mode)[0]
        if mode == "RGBA":
            picture.putpixel((0, 0), (1, 2, 3, 0))
        more: dict[str, Any] = {"save_all": True, "append_images": [Image.new(mode, (200, 120))]}
        whole = saved(picture, "WEBP", lossless=lossless, **(more if animated else {}))
        end = whole.index(b"ANMF", whole.index(b"ANMF") + 4) if animated else len(whole)
        for kept in (0.98, 0.8):
            assert share(whole[: int(end * kept)]) == pytest.approx(1 - kept, abs=0.03)
        with pytest.raises(ImageDecodeFailed):
            decode(whole[: end // 4], ANY)
        assert share(whole) is None

    def test_one_that_was_transferred_as_text_is_refused_although_its_decoder_would_show_something(
        self,
    ) -> None:
        whole = saved(textured("RGB")[0], "WEBP", quality=95)
        with pytest.raises(ImageDecodeFailed, match="transferred as text"):
            decode(whole.replace(b"\n", b"\r\n"), ANY)


class TestBmp:
    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
    def test_one_that_is_cut_off_lacks_what_its_header_promises(self, mode: str) -> None:
        whole = saved(textured(mode)[0], "BMP")
        assert share(whole[: int(len(whole) * 0.8)]) == pytest.approx(0.2, abs=0.02)
        with pytest.raises(ImageDecodeFailed):
            decode(whole[: int(len(whole) * 0.8)])


def test_the_limit_is_where_damage_is_refused(photo: Image.Image) -> None:
    cut = saved(photo, quality=85)[:-2]
    decoded = decode(cut, Limits(max_damage=0.001))
    assert isinstance(decoded, Decoded)
    less = saved(photo, quality=85)[:-300]
    with pytest.raises(ImageDecodeFailed, match=r"About .*% .*; less than 0.1% may be .*MAX_IMAGE_DAMAGE"):
        decode(less, Limits(max_damage=0.001))
    with pytest.raises(ImageDecodeFailed, match=r"About .*% .*; nothing may be .*MAX_IMAGE_DAMAGE"):
        decode(less, Limits(max_damage=0))


def test_an_image_of_which_nothing_is_missing_is_read_whatever_the_limit(photo: Image.Image) -> None:
    for cut in (saved(photo, quality=85)[:-2], saved(textured("RGB")[0], "PNG")[:-1]):
        found = decode(cut, Limits(max_damage=0)).damage
        assert found
        assert found.share == 0


def test_a_png_that_was_transferred_as_text_is_said_to_be_one() -> None:
    with pytest.raises(UnsupportedMediaType, match="a PNG that was transferred as text"):
        decode(saved(textured("RGB")[0], "PNG").replace(b"\r\n", b"\n"))
