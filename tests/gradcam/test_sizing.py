"""How photos are brought to a network's input size, and which part of them the input shows."""

import math
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.gradcam.sizing import (
    SIZINGS,
    Fit,
    Layout,
    Placement,
    Sizing,
    find_sizing,
    spans,
    whole_span,
)

SIDES = st.integers(1, 3000)
SIZES = st.tuples(SIDES, SIDES)
INPUTS = st.tuples(st.integers(8, 600), st.integers(8, 600))
FITTED = st.sampled_from(
    [
        Sizing(fit="crop"),
        Sizing(fit="crop", crop_fraction=0.875),
        Sizing(fit="crop", short_side=256),
        Sizing(fit="crop", size=(256, 300)),
        Sizing(fit="letterbox"),
    ]
)


def torchvision_resize(height: int, width: int, short_side: int) -> tuple[int, int]:
    """`torchvision.transforms.functional._compute_resized_output_size` for one number."""
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = short_side, int(short_side * long / short)
    return (new_long, new_short) if width <= height else (new_short, new_long)


class TestLayout:
    @settings(deadline=None)
    @given(SIZES, INPUTS)
    def test_squash_fills_the_input_whatever_the_proportions(
        self, photo: tuple[int, int], size: tuple[int, int]
    ) -> None:
        assert Sizing("nearest").layout(photo, size) == Layout(size, 0, 0)
        assert Sizing("nearest").placement(photo, size) is None

    @pytest.mark.parametrize(
        ("photo", "top", "left"),
        [((480, 640), 16, 58), ((640, 480), 58, 16), ((400, 400), 16, 16), ((375, 500), 16, 58)],
    )
    def test_torchvision_resizes_to_256_and_cuts_224_out_of_the_centre(
        self, photo: tuple[int, int], top: int, left: int
    ) -> None:
        layout = SIZINGS["torchvision"].layout(photo, (224, 224))
        assert layout == Layout(torchvision_resize(*photo, 256), top, left)
        assert layout == Sizing("nearest", "crop", short_side=256).layout(photo, (224, 224))

    @settings(deadline=None)
    @given(SIZES, st.integers(8, 600), st.integers(1, 600))
    def test_the_sides_of_a_crop_are_torchvisions(
        self, photo: tuple[int, int], side: int, short_side: int
    ) -> None:
        layout = Sizing(fit="crop", short_side=short_side).layout(photo, (side, side))
        assert layout.resized == torchvision_resize(*photo, short_side)
        for length, offset in zip(layout.resized, (layout.top, layout.left), strict=True):
            padding = (side - length) // 2 if side > length else 0  # CenterCrop pads what is too small
            assert offset == (round((length - side) / 2.0) if length >= side else -padding)

    @pytest.mark.parametrize(
        ("side", "fraction", "resized"),
        [(224, 0.875, 256), (288, 0.95, 303), (299, 0.875, 341), (224, 1, 224)],
    )
    def test_a_crop_fraction_gives_timms_sizes(self, side: int, fraction: float, resized: int) -> None:
        layout = Sizing(fit="crop", crop_fraction=fraction).layout((500, 500), (side, side))
        assert layout.resized == (resized, resized) == (math.floor(side / fraction),) * 2

    def test_a_crop_covers_an_input_that_is_no_square(self) -> None:
        assert Sizing(fit="crop").layout((400, 400), (100, 200)) == Layout((200, 200), 50, 0)
        assert Sizing(fit="crop").layout((300, 900), (200, 100)) == Layout((200, 600), 0, 250)

    def test_a_letterbox_holds_the_whole_photo_in_its_middle(self) -> None:
        assert Sizing(fit="letterbox").layout((300, 600), (224, 224)) == Layout((112, 224), -56, 0)
        assert Sizing(fit="letterbox").layout((600, 200), (224, 224)) == Layout((224, 75), 0, -74)
        assert Sizing(fit="letterbox").layout((1, 5000), (224, 224)).resized == (1, 224)


class TestPlacement:
    def test_a_crop_shows_a_part_of_the_photo(self) -> None:
        placement = SIZINGS["torchvision"].placement((400, 800), (224, 224))
        assert placement
        assert placement.box((400, 800)) == (225, 25, 575, 375)

    def test_a_letterbox_shows_more_than_the_photo(self) -> None:
        placement = Sizing(fit="letterbox").placement((300, 600), (224, 224))
        assert placement == Placement(left=0, top=-0.5, right=1, bottom=1.5)

    @pytest.mark.parametrize("fit", ["crop", "letterbox"])
    def test_a_photo_with_the_inputs_proportions_is_shown_whole(self, fit: Fit) -> None:
        assert Sizing(fit=fit).placement((500, 500), (224, 224)) is None

    @settings(deadline=None)
    @given(SIZES, INPUTS, FITTED, st.floats(0, 1), st.floats(0, 1))
    def test_a_place_in_the_input_is_mapped_to_the_photo_and_back(
        self, photo: tuple[int, int], size: tuple[int, int], sizing: Sizing, across: float, down: float
    ) -> None:
        layout = sizing.layout(photo, size)
        shown = sizing.placement(photo, size) or Placement(0, 0, 1, 1)
        left, top, right, bottom = shown.box(photo)
        x, y = left + across * (right - left), top + down * (bottom - top)
        assert x * layout.resized[1] / photo[1] - layout.left == pytest.approx(across * size[1], abs=1e-6)
        assert y * layout.resized[0] / photo[0] - layout.top == pytest.approx(down * size[0], abs=1e-6)

    @settings(deadline=None)
    @given(SIZES, INPUTS, FITTED)
    def test_the_pixels_on_which_the_grid_lies_are_those_with_their_centre_on_it(
        self, photo: tuple[int, int], size: tuple[int, int], sizing: Sizing
    ) -> None:
        for span, pixels in zip(spans(sizing.placement(photo, size), photo), photo, strict=True):
            assert 0 <= span.first < span.last <= pixels
            inside = [pixel for pixel in range(pixels) if span.start <= pixel + 0.5 < span.end]
            if inside:
                assert (inside[0], inside[-1] + 1) == (span.first, span.last)

    def test_without_a_placement_the_grid_lies_on_all_of_the_photo(self) -> None:
        assert spans(None, (30, 40)) == (whole_span(30), whole_span(40))

    def test_cells_on_the_padding_of_a_letterbox_are_not_visible(self) -> None:
        assert Placement(0, -0.5, 1, 1.5).visible((7, 7)) == (slice(2, 5), slice(0, 7))
        assert Placement(0.2, 0.3, 0.7, 0.8).visible((7, 5)) == (slice(0, 7), slice(0, 5))
        assert Placement(0, -80, 1, 81).visible((14, 14)) == (slice(6, 7), slice(0, 14)), "one at least"


class TestRefused:
    @pytest.mark.parametrize(
        ("values", "why"),
        [
            ({"resize": "cubic"}, "resize is 'cubic': it must be one of area, nearest"),
            ({"fit": "pad"}, "fit is 'pad': it must be one of squash, crop, letterbox"),
            (
                {"short_side": 256},
                "short_side, crop_fraction and size belong to fit = \"crop\", not to 'squash'",
            ),
            ({"fit": "crop", "short_side": 0}, "short_side is 0: it must be from 1 to"),
            (
                {"fit": "crop", "crop_fraction": 1.1},
                "crop_fraction is 1.1: it must be from 0.1 to 1",
            ),
            ({"fit": "crop", "crop_fraction": math.nan}, "crop_fraction is nan"),
            ({"fit": "crop", "crop_fraction": 0.0001}, "crop_fraction is 0.0001"),
            ({"fit": "crop", "crop_fraction": 0.9, "short_side": 256}, "exclude each other"),
            ({"fit": "crop", "color": (114,)}, "color belongs to fit = \"letterbox\", not to 'crop'"),
            ({"fit": "letterbox", "color": (256,)}, "color is [256]: it must be one level from 0 to 255"),
            ({"fit": "letterbox", "color": ()}, "color is []"),
            ({"grey": "bgr"}, "grey is 'bgr': it must be one of true, false, tf, tf_bgr"),
            ({"recompress": 100}, "recompress is 100: it must be the quality of a JPEG, from 1 to 95"),
        ],
    )
    def test_a_value_that_is_none_is_named(self, values: dict[str, Any], why: str) -> None:
        with pytest.raises(InvalidSettings) as refused:
            Sizing(**values)
        assert why in str(refused.value)

    def test_a_colour_has_one_level_or_one_for_each_channel(self) -> None:
        Sizing(fit="letterbox", color=(1, 2, 3)).check_channels(3)
        Sizing(fit="letterbox", color=(1,)).check_channels(5)
        with pytest.raises(InvalidSettings, match="color has 3 levels for 5 channels: give one"):
            Sizing(fit="letterbox", color=(1, 2, 3)).check_channels(5)

    @pytest.mark.parametrize("sizing", [Sizing(grey=True), Sizing(fast_jpeg=True), Sizing(recompress=75)])
    def test_what_is_for_photos_is_refused_for_other_images(self, sizing: Sizing) -> None:
        sizing.check_channels(3)
        with pytest.raises(InvalidSettings, match="for photos, which have 3 channels: these images have 5"):
            sizing.check_channels(5)

    def test_a_preset_that_there_is_not_is_refused_with_one_like_it(self) -> None:
        with pytest.raises(InvalidSettings, match="no sizing 'torchvison'; did you mean 'torchvision'"):
            find_sizing("torchvison")


class TestPresets:
    def test_the_default_is_that_of_the_catalog(self) -> None:
        assert {row.sizing for row in CATALOG.values()} == {SIZINGS["area"]} == {Sizing()}

    def test_each_is_described_for_the_manifest(self) -> None:
        assert {name: sizing.describe() for name, sizing in SIZINGS.items()} == {
            "area": "area, squash",
            "keras.load_img": "nearest, squash",
            "tf.image.resize": "bilinear_tf in fractions, squash",
            "image_dataset_from_directory": "fast JPEG, bilinear_tf in fractions, squash",
            "torchvision": "bilinear_antialias, centre crop of 0.875",
            "timm": "bicubic_antialias, centre crop of 0.875",
            "opencv": "bilinear, squash",
        }
        assert Sizing(fit="letterbox", color=(1, 2, 3)).describe() == "area, letterbox on 1 2 3"
        assert Sizing("lanczos", "crop", short_side=256).describe() == "lanczos, short side 256, centre crop"
        squashed = Sizing("lanczos4", "crop", size=(256, 300), grey=True)
        assert squashed.describe() == "grey, lanczos4, squash to 256 x 300, centre crop"
        assert Sizing("skimage", grey="tf_bgr").describe() == "grey of tf_bgr, skimage in fractions, squash"
        assert Sizing("skimage", recompress=75).describe() == "skimage, JPEG 75, squash"

    def test_two_that_differ_are_described_differently(self) -> None:
        assert {field.name for field in fields(Sizing)} == {
            "resize",
            "fit",
            "short_side",
            "crop_fraction",
            "color",
            "size",
            "grey",
            "fast_jpeg",
            "recompress",
        }, "a new field belongs into the description, by which a manifest is known to be another's"
