from collections import Counter
from pathlib import Path

import pytest

from devtools.faults.campaign import ATTACKS
from devtools.faults.image_mutations import REFUSED, WAYS, mutations, whole
from devtools.faults.images import TYPED, attack
from gradcam_worker.errors import UnsupportedMediaType
from gradcam_worker.gradcam.decoding.decode import decode

SHORT = ATTACKS["images"].short


def test_every_kind_is_an_image_before_it_is_damaged_and_what_is_not_read_here_is_refused() -> None:
    for name, data in whole().items():
        try:
            assert decode(data).pixels.shape == (96, 96, 3)
            assert not name.startswith(REFUSED)
        except UnsupportedMediaType:
            assert name.startswith(REFUSED)


def test_the_same_seed_makes_the_same_images_and_every_kind_meets_every_way() -> None:
    first, second = list(mutations(SHORT, 3)), list(mutations(SHORT, 3))
    assert first == second
    assert first != list(mutations(SHORT, 4))
    pairs = Counter(mutant.name for mutant in first[: len(whole()) * len(WAYS)])
    assert len(pairs) == len(whole()) * len(WAYS)
    changed = sum(mutant.data not in whole().values() for mutant in first)
    assert changed > 0.98 * SHORT


def test_mutated_images_end_in_a_picture_or_a_typed_error_whatever_was_done_to_them() -> None:
    verdict = attack(SHORT, seed=1)
    figures = verdict.figures
    assert (verdict.untyped, figures["crashes"]) == (0, 0), verdict.broken
    assert sum(figures["outcomes"].values()) == verdict.jobs == SHORT
    assert set(figures["outcomes"]) == TYPED, "each of the ends is reached"
    assert figures["peak_mb"] < 1536


@pytest.mark.parametrize(
    ("broken", "seen"),
    [
        ("raise KeyError('chunk')", "untyped"),
        ("return decode.Decoded(np.zeros((1, 1, 3), np.uint8), 'image/png')", "untyped"),
        ("os.abort()", "crashes"),
        ("return np.ones(2**31)", "untyped"),
    ],
)
def test_the_attack_sees_a_decoder_that_breaks_its_promise(
    broken: str, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "import numpy as np\n"
        "from gradcam_worker.gradcam.decoding import decode\n"
        "from types import SimpleNamespace\n"
        "decode.read_structure = lambda data: SimpleNamespace(declared_pixels=5)\n"
        f"def wrong(data):\n    {broken}\n"
        "decode.decode = wrong\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    verdict = attack(3, seed=1)
    assert {"untyped": verdict.untyped, **verdict.figures}[seen] == 3
    assert len(verdict.broken) == 3
