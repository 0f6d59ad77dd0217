"""What a worker says of its networks, and what a client reads of it."""

import json
from pathlib import Path

from gradcam_worker.client.live_workers import read_live_workers
from gradcam_worker.gradcam.registry.registry import Registry
from gradcam_worker.runtime.offered_networks import NetworkReport
from gradcam_worker.settings import Settings

OWN = """
[networks.tumours]
model = "tumours.keras"
sha256 = "{sha256}"
labels = ["benign", "malignant"]
preprocessing = "torch"
input_size = [384, 320]
"""


def report(tmp_path: Path) -> str:
    """The health report of a worker with one network of its own, and weights of two of the catalog."""
    (tmp_path / "networks.toml").write_text(OWN.format(sha256="ab" * 32))
    (tmp_path / "vgg16_weights_tf_dim_ordering_tf_kernels.h5").touch()
    settings = Settings(networks=tmp_path / "networks.toml", weights_dir=tmp_path)
    offered = NetworkReport(settings, Registry(settings.networks)).read()
    return json.dumps({"device": "cpu", "running": 2, "trouble": None, "version": "1", "networks": offered})


def test_a_worker_offers_the_networks_whose_weights_it_has(tmp_path: Path) -> None:
    live = read_live_workers({"a:1": report(tmp_path), "b:1": report(tmp_path)})
    assert [one.name for one in live.networks] == ["efficientnet_lite0", "tumours", "vgg16"]
    tumours, vgg16 = live.networks[1:]
    assert (tumours.input_size, tumours.labels, tumours.classes) == ((384, 320), ("benign", "malignant"), 2)
    assert (vgg16.layer, vgg16.imagenet, vgg16.classes, vgg16.workers) == ("block5_conv3", True, 1000, 2)
    assert live.workers[0].networks == ("efficientnet_lite0", "vgg16", "tumours")


def test_workers_of_another_version_are_read_as_far_as_they_can_be() -> None:
    live = read_live_workers(
        {
            "old:1": '{"device": "cpu", "running": 1, "trouble": "no disk"}',
            "new:1": '{"device": "cpu", "networks": {"catalog": ["not_known_yet"], "own": [{"name": 7}]}}',
            "bad:1": "[]",
        }
    )
    assert [(one.id, bool(one.trouble)) for one in live.workers] == [
        ("bad:1", True),
        ("new:1", True),
        ("old:1", True),
    ]
    assert (live.workers[2].trouble, live.workers[2].version, live.networks) == ("no disk", None, ())
