"""Weights of a folder, of Keras's download and of a registry entry make one and the same network: all 40."""

import pytest

from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow

pytestmark = [
    pytest.mark.large,
    pytest.mark.tensorflow,
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation:DeprecationWarning"
    ),  # Keras's own, as it saves
]
ROWS = [row for row in CATALOG.values() if not row.shipped]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_a_network_has_one_graph_and_the_same_logits_in_all_ways(row: NetworkRow) -> None:
    from devtools.agreement.weights import weigh

    assert weigh(row).agrees
