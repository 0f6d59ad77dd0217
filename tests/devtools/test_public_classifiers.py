"""The registry entries of the public classifiers are valid: the comparison itself downloads packages."""

from pathlib import Path

import pytest

from devtools.agreement.public_classifiers import PUBLIC
from gradcam_worker.gradcam.registry.registry import Registry


@pytest.mark.parametrize("name", PUBLIC)
def test_its_entry_in_the_registry_is_valid(name: str, tmp_path: Path) -> None:
    public = PUBLIC[name]
    suffix = Path(public.model).suffix if public.convert is None else ".keras"
    path = tmp_path / "networks.toml"
    file = f'model = "/models/{name}{suffix}"\nsha256 = "{"0" * 64}"\n'
    path.write_text(f"[networks.{name}]\n{file}{public.entry}\n")
    row = Registry(path).find(name)
    assert row.file
    assert row.scores_only == (suffix in {".onnx", ".tflite"})
    assert row.sizing.describe() != "area, squash", "each owner's own way"
