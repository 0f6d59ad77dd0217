"""`scripts/compare-evidence` in its short form: two small trainings."""

import pytest

from devtools.planted.compare_evidence import examine, in_lines


@pytest.mark.tensorflow
def test_a_watermark_is_named_first_and_other_images_of_one_training_name_nothing() -> None:
    outcomes = examine([20], [22], compared=300, images=700, epochs=5)
    assert [(one.case, one.seeds, one.is_right) for one in outcomes] == [
        ("other images", (20, 20), True),
        ("watermark", (20, 22), True),
    ]
    assert len(in_lines(outcomes)) == 4
