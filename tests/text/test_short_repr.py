from dataclasses import dataclass, field

import numpy as np

from gradcam_worker.text.short_repr import short_repr


@dataclass
class Picture:
    name: str
    pixels: object
    data: bytes
    secret: str = field(default="planted", repr=False)

    __repr__ = short_repr


def test_arrays_are_shown_by_their_shape_and_bytes_by_their_number() -> None:
    shown = repr(Picture("a", np.zeros((480, 640, 3), np.uint8), b"x" * 2048))
    assert shown == "Picture(name='a', pixels=uint8(480, 640, 3), data=<2,048 bytes>)"
