import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.gradcam.imaging.sheet import (
    LONGEST,
    NARROWEST,
    as_tile,
    bar,
    framed,
    in_rows,
    letters,
    sheet,
    shortened,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def plain(color: tuple[int, int, int], height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), color, np.uint8)


def place(drawn: NDArray[np.uint8], color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Where a colour is: left, top, right, bottom."""
    ys, xs = np.nonzero((drawn == color).all(-1))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def ink(title: str) -> NDArray[np.uint8]:
    """A title as it is drawn, above nothing."""
    drawn = framed(title, plain(WHITE, 1, 480))
    return drawn[: bar(letters(480))]


class TestATile:
    @pytest.mark.parametrize(
        ("source", "shown"),
        [
            ((3000, 4000), (360, 480)),
            ((16, 16), (416, 416)),
            ((1, 1), (416, 416)),
            ((300, 4000), (54, LONGEST)),
            ((4000, 300), (LONGEST, 54)),
            ((1, 30_000), (1, LONGEST)),
        ],
    )
    def test_a_picture_of_any_size_is_shown_in_its_own_proportions(
        self, source: tuple[int, int], shown: tuple[int, int]
    ) -> None:
        assert as_tile(plain(RED, *source)).shape == (*shown, 3)


class TestTheSheet:
    def test_pictures_stand_three_in_a_row(self) -> None:
        rows = in_rows([(str(number), plain(RED, 1, 1)) for number in range(7)])
        assert [[title for title, _ in row] for row in rows] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]

    def test_pictures_stand_in_rows_and_columns_on_white(self) -> None:
        rows = [
            [("", plain(RED, 200, 300)), ("", plain(GREEN, 200, 300))],
            [("", plain(BLUE, 200, 300))],
        ]
        drawn = sheet(rows)
        red, green, blue = (place(drawn, color) for color in (RED, GREEN, BLUE))
        for left, top, right, bottom in (red, green, blue):
            assert (right - left, bottom - top) == (300, 200)
            drawn[top:bottom, left:right] = 255
        assert (drawn == 255).all()
        assert (red[0], red[1]) == (blue[0], green[1])
        assert green[0] > red[2]
        assert blue[1] > red[3] + bar(letters(300))

    def test_a_row_is_as_high_as_its_highest_picture(self) -> None:
        low, high = plain(RED, 10, 300), plain(RED, 200, 300)
        flat, mixed, tall = (
            sheet([row]).shape[0] for row in ([("", low)], [("", low), ("", high)], [("", high)])
        )
        assert flat < mixed == tall

    @pytest.mark.parametrize("size", [(1, 1), (16, 16), (54, 720), (720, 54), (360, 480)])
    def test_a_title_is_written_above_its_picture_and_touches_nothing(self, size: tuple[int, int]) -> None:
        title = "812 space shuttle, and a name that is much too long for a line such as this one 77.1 %"
        drawn = sheet([[(title, plain(RED, *size)), (title, plain(GREEN, *size))]])
        for color in (RED, GREEN):
            left, top, right, bottom = place(drawn, color)
            assert (right - left, bottom - top) == (size[1], size[0])
            drawn[top:bottom, left:right] = 255
        dark = np.asarray((drawn < 128).all(-1))
        ys, xs = np.nonzero(dark)
        left, top, *_ = place(sheet([[("", plain(RED, *size))]]), RED)
        assert ys.max() < top
        assert ys.min() > 0
        cell = max(size[1], NARROWEST)
        gap = letters(cell)
        assert not dark[:, left + cell : left + cell + gap].any(), "nothing between the columns"
        assert not dark[:, -gap:].any()
        assert xs.min() >= left

    def test_titles_are_black_on_white_and_their_edges_smooth(self) -> None:
        assert set(np.unique(ink("812 espresso"))) > {0, 255}
        assert (ink("") == 255).all()


class TestTheFrame:
    def test_a_picture_stands_below_its_title(self) -> None:
        drawn = framed("812 space shuttle 77.1 %", plain(RED, 300, 400))
        height = bar(letters(400))
        assert drawn.shape == (height + 300, 400, 3)
        assert_array_equal(drawn[height:], plain(RED, 300, 400))
        assert (drawn[:height] < 128).any()

    def test_a_narrow_picture_stands_in_the_middle_of_a_frame_wide_enough_for_a_title(self) -> None:
        drawn = framed("x", plain(RED, 100, 40))
        assert drawn.shape[1] == NARROWEST
        assert place(drawn, RED)[::2] == (100, 140)


class TestATitle:
    def test_one_that_fits_is_left_alone(self) -> None:
        assert shortened("718 pier 77.1 %", 480, 21) == "718 pier 77.1 %"

    @pytest.mark.parametrize("tail", ["100.0 %", "77.1 %", "<0.1 %"])
    def test_one_too_long_loses_the_end_of_the_name_but_not_number_and_probability(self, tail: str) -> None:
        title = f"718 {'a very long name ' * 20}{tail}"
        short = shortened(title, 480, 21)
        head, _, end = short.partition("…")
        assert title.startswith(head)
        assert head.startswith("718 a very")
        assert end.endswith(tail)
        one_more = f"{title[: len(head) + 2]}{short[len(head) :]}"
        assert shortened(one_more, 480, 21) != one_more, "no shorter than it has to be"

    def test_a_title_is_one_line_of_what_can_be_printed(self) -> None:
        assert shortened("a\nb\tc\0d\u202ee\ud800f", 480, 21) == "a b c d e f"

    def test_however_long_a_name_is_it_is_cut(self) -> None:
        assert len(shortened("x" * 200_000, 480, 21)) < 80

    def test_an_accent_is_part_of_its_letter(self) -> None:
        assert_array_equal(ink("cafe\u0301"), ink("café"))

    @pytest.mark.parametrize(
        "name", ["Käse", "ŐŰ", "γάτα", "кошка", "חתול", "قطة", "三毛猫", "キャット", "고양이"]
    )
    def test_letters_of_many_scripts_are_drawn(self, name: str) -> None:
        assert not np.array_equal(ink(name), ink("?" * len(name)))
        drawn = {ink(letter).tobytes() for letter in name}
        assert len(drawn) == len(set(name)), "each letter has a shape of its own"

    def test_a_letter_that_there_is_none_of_becomes_a_question_mark(self) -> None:
        assert_array_equal(ink("5 \N{CAT FACE} 77.1 %"), ink("5 ? 77.1 %"))
