"""How a photo is brought to the input size of a network, and which part of the photo the input then shows.

An owner's network predicts as in production only if photos are resized as its owner resizes them. `Sizing`
says how; `SIZINGS` has the ways of well-known tools by name. A `Placement` maps the grid of a heatmap back to
the photo.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.text.similar_names import nearest

Resize = Literal[
    "area",
    "nearest",
    "bilinear",
    "bilinear_tf",
    "bilinear_tf1",
    "bilinear_antialias",
    "bicubic",
    "bicubic_antialias",
    "lanczos",
    "lanczos4",
    "skimage",
]
Fit = Literal["squash", "crop", "letterbox"]
Grey = Literal["tf", "tf_bgr"]
Size = tuple[int, int]  # (height, width) in pixels

MAX_SHORT_SIDE = 16_384  # in pixels
MIN_CROP_FRACTION = 0.1  # so that the resized photo, of which a centre is cut out, fits into memory
MAX_LEVEL = 255
MAX_QUALITY = 95  # of a JPEG, for Pillow
RGB_CHANNELS = 3
OPENCV_RESIZES = ("bilinear", "bicubic", "lanczos4")
FRACTIONAL_RESIZES = ("bilinear_tf", "bilinear_tf1", "skimage")  # their tools give fractions of levels


def _no_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    return f"{name} is {value!r}: it must be one of {', '.join(choices)}"


@dataclass(frozen=True)
class Sizing:
    """How a photo is resized to the input size of a network.

    Attributes:
        resize: How pixels are computed. `area`: the mean of an area, or bilinear where a side is enlarged;
            `nearest`: of Pillow and of `keras.utils.load_img`; `bilinear`: of four pixels, however much the
            photo is shrunk, as OpenCV's `INTER_LINEAR`; `bilinear_tf`: the same as `tf.image.resize` does it;
            `bilinear_antialias`, `bicubic_antialias`, `lanczos`: of Pillow, and so of torchvision
            and timm; `bicubic`, `lanczos4`: of 16 and 64 pixels, as OpenCV's `INTER_CUBIC` and
            `INTER_LANCZOS4`; `bilinear_tf1`: as `tf.image.resize_bilinear` of TensorFlow 1, whose grid lies
            at the upper left; `skimage`: as `skimage.transform.resize`, blurred before it is shrunk. Those of
            TensorFlow and scikit-image give fractions of levels, as their tools do.
        fit: `squash`: to the input size, whatever the proportions; `crop`: the short side is resized and the
            centre is cut out; `letterbox`: the whole photo is fitted in, and the rest is filled.
        short_side: Of `crop`: to how many pixels the short side is resized before the centre is cut out.
        crop_fraction: Of `crop`, instead of `short_side`: which share of the resized photo's short side the
            centre is; default: all of it.
        size: Of `crop`, instead of both: to which (height, width) the photo is resized, whatever the
            proportions, before the centre is cut out.
        grey: Make the photo grey first, by luminance in whole levels. For networks that take grey images, or
            three equal channels, and whose owner's code resizes what is grey already. True: rounded, as by
            OpenCV and Pillow; `tf`: as by `tf.image.rgb_to_grayscale`; `tf_bgr`: by that from OpenCV's order
            of channels, which it takes for red, green and blue.
        fast_jpeg: Decode JPEG by the fast transform of libjpeg, as TensorFlow does unless it is told not to.
        recompress: After the photo is resized, and before its centre is cut out, write it as JPEG of this
            quality, and read it again.
        color: Of `letterbox`: what the rest is filled with, one level for all channels or one for each.

    Raises:
        InvalidSettings: A value is none of those, or belongs to another `fit`.

    Examples:
        >>> Sizing("bilinear_antialias", "crop", short_side=256).describe()
        'bilinear_antialias, short side 256, centre crop'
    """

    resize: Resize = "area"
    fit: Fit = "squash"
    short_side: int | None = None
    crop_fraction: float | None = None
    color: tuple[int, ...] = (0,)
    size: Size | None = None
    grey: bool | Grey = False
    fast_jpeg: bool = False
    recompress: int | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for is_wrong, message in (
            (self.resize not in get_args(Resize), _no_choice("resize", self.resize, get_args(Resize))),
            (
                not isinstance(self.grey, bool) and self.grey not in get_args(Grey),
                _no_choice("grey", self.grey, ("true", "false", *get_args(Grey))),
            ),
            (self.fit not in get_args(Fit), _no_choice("fit", self.fit, get_args(Fit))),
            (
                self.fit != "crop" and (self.short_side, self.crop_fraction, self.size) != (None, None, None),
                f'short_side, crop_fraction and size belong to fit = "crop", not to {self.fit!r}',
            ),
            (
                (self.short_side, self.crop_fraction, self.size).count(None) < 2,  # noqa: PLR2004  # of three
                "short_side, crop_fraction and size exclude each other: give one of them",
            ),
            (
                self.size is not None and not all(1 <= side <= MAX_SHORT_SIDE for side in self.size),
                f"size is {self.size}: its height and width must be from 1 to {MAX_SHORT_SIDE} pixels",
            ),
            (
                self.short_side is not None and not 1 <= self.short_side <= MAX_SHORT_SIDE,
                f"short_side is {self.short_side}: it must be from 1 to {MAX_SHORT_SIDE} pixels",
            ),
            (
                self.crop_fraction is not None and not MIN_CROP_FRACTION <= self.crop_fraction <= 1,
                f"crop_fraction is {self.crop_fraction}: it must be from {MIN_CROP_FRACTION} to 1",
            ),
            (
                self.fit != "letterbox" and self.color != (0,),
                f'color belongs to fit = "letterbox", not to {self.fit!r}',
            ),
            (
                self.recompress is not None and not 1 <= self.recompress <= MAX_QUALITY,
                f"recompress is {self.recompress}: it must be the quality of a JPEG, from 1 to {MAX_QUALITY}",
            ),
            (
                not self.color or not all(0 <= level <= MAX_LEVEL for level in self.color),
                f"color is {list(self.color)}: it must be one level from 0 to {MAX_LEVEL}, or one a channel",
            ),
        ):
            if is_wrong:
                raise InvalidSettings(message)

    def check_channels(self, channels: int) -> None:
        """Check that it suits images with this number of channels. Raises InvalidSettings."""
        if self.grey and channels != RGB_CHANNELS:
            message = f"grey is for photos, which have {RGB_CHANNELS} channels: these images have {channels}"
            raise InvalidSettings(message)
        if (self.fast_jpeg or self.recompress) and channels != RGB_CHANNELS:
            message = (
                f"fast_jpeg and recompress are for photos, which have {RGB_CHANNELS} channels: these images "
                f"have {channels}"
            )
            raise InvalidSettings(message)
        if len(self.color) not in {1, channels}:
            message = f"color has {len(self.color)} levels for {channels} channels: give one, or one for each"
            raise InvalidSettings(message)

    @property
    def is_fractional(self) -> bool:
        """Whether the levels of the resized photo are fractions, and not whole numbers."""
        return self.resize in FRACTIONAL_RESIZES and self.recompress is None

    @property
    def pixel_type(self) -> str:
        """The type of the levels from 0 to 255 that a network is given: float32, if they have fractions."""
        return "float32" if self.is_fractional else "uint8"

    def describe(self) -> str:
        """Describe it for a manifest, as in `bicubic_antialias, centre crop of 0.875`."""
        fitted = {
            "squash": "squash",
            "crop": f"short side {self.short_side}, centre crop"
            if self.short_side
            else f"squash to {self.size[0]} x {self.size[1]}, centre crop"
            if self.size
            else f"centre crop of {self.crop_fraction or 1:g}",
            "letterbox": f"letterbox on {' '.join(map(str, self.color))}",
        }[self.fit]
        steps = (
            "fast JPEG" if self.fast_jpeg else "",
            f"grey of {self.grey}" if isinstance(self.grey, str) else "grey" if self.grey else "",
            f"{self.resize} in fractions" if self.is_fractional else self.resize,
            f"JPEG {self.recompress}" if self.recompress else "",
            fitted,
        )
        return ", ".join(filter(None, steps))

    def layout(self, photo_size: Size, input_size: Size) -> "Layout":
        """Compute to which size a photo is resized, and where in it the input lies.

        Sides are rounded as by torchvision and timm for a crop, or as by tools of OpenCV if it resizes; by
        Pillow's `ImageOps.pad` for a letterbox.

        Args:
            photo_size: (height, width) of the photo.
            input_size: (height, width) of the network's input.

        Returns:
            The layout.
        """
        if self.fit == "squash":
            return Layout(input_size, 0, 0)
        if self.fit == "letterbox":
            resized = _contained(photo_size, input_size)
            top, left = (round((side - length) / 2) for length, side in zip(resized, input_size, strict=True))
            return Layout(resized, 0 - top, 0 - left)
        resized = self._resized_for_crop(photo_size, input_size)
        return Layout(resized, *map(_crop_offset, resized, input_size))

    def _resized_for_crop(self, photo_size: Size, input_size: Size) -> Size:
        """The size to which a photo is resized before its centre is cut out."""
        if self.size:
            return self.size
        (height, width), fraction = photo_size, self.crop_fraction or 1.0
        wanted = [math.floor(side / fraction) for side in input_size]
        if self.short_side is None and wanted[0] != wanted[1]:  # so that the photo covers it, as in timm
            ratio = min(height / wanted[0], width / wanted[1])
            return max(round(height / ratio), wanted[0]), max(round(width / ratio), wanted[1])
        short = self.short_side or wanted[0]
        long = short * max(photo_size) / min(photo_size)
        long = round(long) if self.resize in OPENCV_RESIZES else int(long)
        return (short, long) if height <= width else (long, short)

    def placement(self, photo_size: Size, input_size: Size) -> "Placement | None":
        """The part of a photo that the input shows; None: exactly all of it.

        Args:
            photo_size: (height, width) of the photo.
            input_size: (height, width) of the network's input.
        """
        layout = self.layout(photo_size, input_size)
        if layout.resized == input_size:
            return None
        (height, width), (rows, columns) = layout.resized, input_size
        return Placement(
            left=layout.left / width,
            top=layout.top / height,
            right=(layout.left + columns) / width,
            bottom=(layout.top + rows) / height,
        )


DEFAULT_SIZING = Sizing()
SIZINGS = {
    "area": DEFAULT_SIZING,
    "keras.load_img": Sizing("nearest"),  # keras.utils.load_img and flow_from_directory
    "tf.image.resize": Sizing("bilinear_tf"),
    "image_dataset_from_directory": Sizing("bilinear_tf", fast_jpeg=True),  # also tf.io.decode_jpeg
    "torchvision": Sizing("bilinear_antialias", "crop", crop_fraction=0.875),  # Resize(256), CenterCrop(224)
    "timm": Sizing("bicubic_antialias", "crop", crop_fraction=0.875),
    "opencv": Sizing("bilinear"),  # cv2.resize
}


def find_sizing(name: str) -> Sizing:
    """Find a sizing of `SIZINGS`. Raises InvalidSettings, with suggestions of similar names."""
    if name not in SIZINGS:
        similar = nearest(name, SIZINGS)
        hint = (
            f"did you mean {' or '.join(map(repr, similar))}?"
            if similar
            else f"there are {', '.join(SIZINGS)}"
        )
        message = f"there is no sizing {name!r}; {hint}"
        raise InvalidSettings(message)
    return SIZINGS[name]


def resolve_sizing(sizing: Any, channels: int) -> Sizing:
    """Find a sizing, and check that it suits images with this number of channels. Raises InvalidSettings."""
    found = find_sizing(sizing) if isinstance(sizing, str) else sizing
    if not isinstance(found, Sizing):
        message = (
            f"sizing is a name, as in {next(iter(SIZINGS))!r}, or as in "
            f'Sizing("bilinear", fit="letterbox"), not {found!r}'
        )
        raise InvalidSettings(message)
    found.check_channels(channels)
    return found


def _contained(photo_size: Size, input_size: Size) -> Size:
    """The largest size with a photo's proportions that fits into the input."""
    (height, width), (rows, columns) = photo_size, input_size
    if width / height > columns / rows:
        return max(round(height / width * columns), 1), columns
    if width / height < columns / rows:
        return rows, max(round(width / height * rows), 1)
    return input_size


def _crop_offset(length: int, crop: int) -> int:
    """Where a crop begins in a side; negative where the side is shorter, and is padded."""
    return round((length - crop) / 2.0) if length >= crop else 0 - (crop - length) // 2


@dataclass(frozen=True)
class Layout:
    """A photo is resized to `resized` (height, width); there the input begins at `top`, `left`.

    Outside the resized photo, where they are negative, the input is filled.
    """

    resized: Size
    top: int
    left: int


@dataclass(frozen=True)
class Span:
    """One side of a photo on which a grid lies: from `start` to `end`, in pixels.

    The grid may begin before the photo and end after it. The centres of the pixels from `first` to `last`,
    which is excluded, lie on it; they are one at least.
    """

    start: float
    end: float
    first: int
    last: int

    @property
    def slice(self) -> slice:
        """The pixels on which the grid lies."""
        return slice(self.first, self.last)

    @property
    def pixels(self) -> int:
        """The number of pixels that the grid would have if the photo did not end."""
        return max(round(self.end - self.start), 1)


def whole_span(pixels: int) -> Span:
    """The span of a grid that covers a side of a photo."""
    return Span(0, pixels, 0, pixels)


def spans(placement: "Placement | None", size: Size) -> tuple[Span, Span]:
    """The rows and columns of a photo, (height, width), on which a grid lies; None: all of them."""
    if placement is None:
        return whole_span(size[0]), whole_span(size[1])
    return (
        _span(placement.top, placement.bottom, size[0]),
        _span(placement.left, placement.right, size[1]),
    )


def _span(begin: float, end: float, pixels: int) -> Span:
    start, stop = begin * pixels, end * pixels
    first = min(max(math.ceil(start - 0.5), 0), pixels - 1)
    last = min(max(math.ceil(stop - 0.5), first + 1), pixels)
    return Span(start, stop, first, last)


@dataclass(frozen=True)
class Placement:
    """The part of a photo that the input of a network shows, as shares of the photo's width and height.

    A crop lies inside the photo. A letterbox reaches beyond it: below 0, or above 1.
    """

    left: float
    top: float
    right: float
    bottom: float

    @property
    def is_inside(self) -> bool:
        """Whether a part of the photo is not shown."""
        return self.left > 0 or self.top > 0 or self.right < 1 or self.bottom < 1

    def box(self, size: Size) -> tuple[float, float, float, float]:
        """Left, top, right and bottom in pixels of a photo (height, width)."""
        height, width = size
        return self.left * width, self.top * height, self.right * width, self.bottom * height

    def visible(self, grid: Size) -> tuple[slice, slice]:
        """The rows and columns of a grid whose centres lie on the photo; one of each at least."""
        return (
            _visible(self.top, self.bottom, grid[0]),
            _visible(self.left, self.right, grid[1]),
        )


def _visible(begin: float, end: float, cells: int) -> slice:
    centers = [begin + (cell + 0.5) / cells * (end - begin) for cell in range(cells)]
    on_photo = [cell for cell, center in enumerate(centers) if 0 <= center <= 1]
    if not on_photo:
        on_photo = [min(range(cells), key=lambda cell: abs(centers[cell] - 0.5))]
    return slice(on_photo[0], on_photo[-1] + 1)
