"""The image of target cpu, without Docker: made as its Dockerfile says, started, used and stopped.

Its packages are copied: `scripts/check-deploy --rehearse` installs them, test_install.py those of a client.
"""

import pytest

from devtools.deploy_checks import rehearsal

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]


@pytest.mark.timeout(600)
def test_the_image_is_made_by_its_dockerfile_gets_ready_and_passes_the_smoke_test() -> None:
    outcome = rehearsal.rehearse(copies_packages=True)
    for expected in ("872  tripod", "967  espresso", "285  Egyptian_cat", "812  space_shuttle"):
        assert expected in outcome.smoke
    assert outcome.findings == []
