from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.runtime.service_factory import build_services
from gradcam_worker.settings import Settings


def test_the_limits_on_images_are_those_of_the_settings() -> None:
    chosen = {
        "GRADCAM_MAX_IMAGE_PIXELS": "1000",
        "GRADCAM_MAX_IMAGE_SIDE": "100",
        "GRADCAM_MAX_IMAGE_DAMAGE": "0.5",
        "GRADCAM_CONVERT_COLORS": "false",
    }
    assert build_services(Settings.from_environment({})).limits == Limits()
    services = build_services(Settings.from_environment(chosen))
    assert services.limits == Limits(1000, 100, 0.5, convert_colors=False)
