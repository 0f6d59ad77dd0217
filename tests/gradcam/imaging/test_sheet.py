from collections.abc import Sequence

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.gradcam.imaging.sheet import (
    MAX_TILE_SIDE,
    MIN_WIDTH,
    Legend,
    arrange_in_rows,
    as_tile,
    letter_height,
    sheet,
    shorten,
    title_height,
    with_legend,
    with_title,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def plain(color: tuple[int, int, int], height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), color, np.uint8)


def bounds(drawn: NDArray[np.uint8], color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The bounds of a colour: left, top, right, bottom."""
    ys, xs = np.nonzero((drawn == color).all(-1))
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def drawn_title(title: str) -> NDArray[np.uint8]:
    """The pixels of a title."""
    drawn = with_title(title, plain(WHITE, 1, 480))
    return drawn[: title_height(letter_height(480))]


class TestTile:
    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ((3000, 4000), (360, 480)),
            ((16, 16), (416, 416)),
            ((1, 1), (416, 416)),
            ((300, 4000), (54, MAX_TILE_SIDE)),
            ((4000, 300), (MAX_TILE_SIDE, 54)),
            ((1, 30_000), (1, MAX_TILE_SIDE)),
        ],
    )
    def test_an_image_of_any_size_keeps_its_proportions(
        self, source: tuple[int, int], expected: tuple[int, int]
    ) -> None:
        assert as_tile(plain(RED, *source)).shape == (*expected, 3)


class TestSheet:
    def test_a_row_has_three_images(self) -> None:
        rows = arrange_in_rows([(str(number), plain(RED, 1, 1)) for number in range(7)])
        assert [[title for title, _ in row] for row in rows] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]

    def test_images_are_placed_in_rows_and_columns_on_white(self) -> None:
        rows = [
            [("", plain(RED, 200, 300)), ("", plain(GREEN, 200, 300))],
            [("", plain(BLUE, 200, 300))],
        ]
        drawn = sheet(rows)
        red, green, blue = (bounds(drawn, color) for color in (RED, GREEN, BLUE))
        for left, top, right, bottom in (red, green, blue):
            assert (right - left, bottom - top) == (300, 200)
            drawn[top:bottom, left:right] = 255
        assert (drawn == 255).all()
        assert (red[0], red[1]) == (blue[0], green[1])
        assert green[0] > red[2]
        assert blue[1] > red[3] + title_height(letter_height(300))

    def test_a_row_is_as_high_as_its_highest_image(self) -> None:
        low, high = plain(RED, 10, 300), plain(RED, 200, 300)
        flat, mixed, tall = (
            sheet([row]).shape[0] for row in ([("", low)], [("", low), ("", high)], [("", high)])
        )
        assert flat < mixed == tall

    @pytest.mark.parametrize("size", [(1, 1), (16, 16), (54, 720), (720, 54), (360, 480)])
    def test_a_title_is_above_its_image_and_touches_nothing(self, size: tuple[int, int]) -> None:
        title = "812 space shuttle, and a name that is much too long for a line such as this one 77.1 %"
        drawn = sheet([[(title, plain(RED, *size)), (title, plain(GREEN, *size))]])
        for color in (RED, GREEN):
            left, top, right, bottom = bounds(drawn, color)
            assert (right - left, bottom - top) == (size[1], size[0])
            drawn[top:bottom, left:right] = 255
        dark = np.asarray((drawn < 128).all(-1))
        ys, xs = np.nonzero(dark)
        left, top, *_ = bounds(sheet([[("", plain(RED, *size))]]), RED)
        assert ys.max() < top
        assert ys.min() > 0
        cell = max(size[1], MIN_WIDTH)
        gap = letter_height(cell)
        assert not dark[:, left + cell : left + cell + gap].any(), "nothing between the columns"
        assert not dark[:, -gap:].any()
        assert xs.min() >= left

    def test_titles_are_black_on_white_and_their_edges_smooth(self) -> None:
        assert set(np.unique(drawn_title("812 espresso"))) > {0, 255}
        assert (drawn_title("") == 255).all()


class TestWithTitle:
    def test_an_image_is_below_its_title(self) -> None:
        drawn = with_title("812 space shuttle 77.1 %", plain(RED, 300, 400))
        height = title_height(letter_height(400))
        assert drawn.shape == (height + 300, 400, 3)
        assert_array_equal(drawn[height:], plain(RED, 300, 400))
        assert (drawn[:height] < 128).any()

    def test_a_narrow_image_is_centred_below_a_title_of_the_least_width(self) -> None:
        drawn = with_title("x", plain(RED, 100, 40))
        assert drawn.shape[1] == MIN_WIDTH
        assert bounds(drawn, RED)[::2] == (100, 140)


class TestTitle:
    def test_a_title_that_fits_is_not_changed(self) -> None:
        assert shorten("718 pier 77.1 %", 480, 21) == "718 pier 77.1 %"

    @pytest.mark.parametrize("tail", ["100.0 %", "77.1 %", "<0.1 %"])
    def test_a_long_title_loses_the_end_of_the_name_but_not_number_and_probability(self, tail: str) -> None:
        title = f"718 {'a very long name ' * 20}{tail}"
        short = shorten(title, 480, 21)
        head, _, end = short.partition("…")
        assert title.startswith(head)
        assert head.startswith("718 a very")
        assert end.endswith(tail)
        longer_by_one = f"{title[: len(head) + 2]}{short[len(head) :]}"
        assert shorten(longer_by_one, 480, 21) != longer_by_one, "it is no shorter than necessary"

    def test_a_title_is_one_line_of_printable_characters(self) -> None:
        assert shorten("a\nb\tc\0d\u202ee\ud800f", 480, 21) == "a b c d e f"

    def test_a_name_of_any_length_is_cut(self) -> None:
        assert len(shorten("x" * 200_000, 480, 21)) < 80

    def test_an_accent_is_part_of_its_letter(self) -> None:
        assert_array_equal(drawn_title("cafe\u0301"), drawn_title("café"))

    @pytest.mark.parametrize(
        "name", ["Käse", "ŐŰ", "γάτα", "кошка", "חתול", "قطة", "三毛猫", "キャット", "고양이"]
    )
    def test_characters_of_many_scripts_are_drawn(self, name: str) -> None:
        assert not np.array_equal(drawn_title(name), drawn_title("?" * len(name)))
        drawn = {drawn_title(letter).tobytes() for letter in name}
        assert len(drawn) == len(set(name)), "all characters look different"

    def test_a_character_that_the_font_lacks_becomes_a_question_mark(self) -> None:
        assert_array_equal(drawn_title("5 \N{CAT FACE} 77.1 %"), drawn_title("5 ? 77.1 %"))


class TestLegend:
    TABLE = np.stack([np.arange(256)] * 3, axis=-1).astype(np.uint8)[:, np.newaxis]

    def legend(self, note: str = "", facts: Sequence[str] = (), alpha: float = 0.5) -> Legend:
        return Legend(self.TABLE, alpha, ("0", "peak"), note, facts)

    def test_the_colours_are_shown_as_they_look_on_bright_and_on_dark_photos(self) -> None:
        drawn = with_legend(plain(RED, 50, 340), self.legend(), 20)
        assert_array_equal(drawn[:50], plain(RED, 50, 340))
        bar = drawn[50:70, 20:-20, 0].astype(int)
        assert (bar[0, 0], bar[-1, 0], bar[0, -1], bar[-1, -1]) == (128, 0, 255, 128)
        assert (np.diff(bar, axis=1) >= 0).all()
        assert (drawn[50:, :20] == 255).all()

    def test_facts_and_words_share_lines_while_there_is_room(self) -> None:
        for legend in (self.legend(facts=["a" * 20] * 6), self.legend(note="many words " * 8)):
            one_line, some, each_alone = (
                with_legend(plain(RED, 50, width), legend, 20).shape[0] for width in (2000, 600, 240)
            )
            assert one_line < some < each_alone
