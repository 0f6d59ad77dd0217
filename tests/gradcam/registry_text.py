"""Registry files for tests."""

from pathlib import Path

SHA256 = "ab" * 32
MODEL = f"""
model = "tumours.keras"
sha256 = "{SHA256}"
preprocessing = "torch"
input_size = [384, 320]
"""
WEIGHTS = f"""
architecture = "VGG16"
weights = "birds.weights.h5"
sha256 = "{SHA256}"
classes = 200
"""


def write(folder: Path, body: str, name: str = "tumours") -> Path:
    """Write a registry file with one network; it replaces the old file in one step."""
    (folder / "new").write_text(f"[networks.{name}]\n{body}")
    return (folder / "new").replace(folder / "networks.toml")
