import io

import numpy as np
import pytest

from gradcam_worker.artifacts.npz import to_npz

DRAW = np.random.default_rng(1)
ARRAYS = {
    "several": {
        "heatmaps": DRAW.random((3, 7, 7), np.float32),
        "class_ids": np.array([967, 0, 5], np.int32),
        "raw_min": np.array([-1, 0, np.inf], np.float32),
    },
    "a part of another": {"heatmaps": DRAW.random((4, 10, 12), np.float32)[1:3, ::2, 3:5]},
    "one that is large": {"heatmaps": DRAW.random((50, 112, 112), np.float32)},
    "no rows": {"heatmaps": np.zeros((0, 7, 7), np.float32)},
    "none": {},
}


@pytest.mark.parametrize("arrays", ARRAYS.values(), ids=ARRAYS)
def test_a_file_is_as_numpy_writes_it(arrays: dict[str, np.ndarray]) -> None:
    expected, written = io.BytesIO(), to_npz(arrays)
    np.savez(expected, **arrays)  # type: ignore[arg-type]
    assert written == expected.getvalue()
    with np.load(io.BytesIO(written)) as file:
        assert [*file] == [*arrays]
        for name, array in arrays.items():
            np.testing.assert_array_equal(file[name], array)
