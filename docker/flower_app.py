"""The Celery app that Flower looks at, with the workers' own settings: `celery -A flower_app flower`."""

# ruff: noqa: INP001  # it stands alone
from gradcam_worker.broker.app import make_app
from gradcam_worker.settings import Settings

app = make_app(Settings.from_environment())
app.conf.broker_transport = None  # it takes no jobs, and knows Redis by kombu's own transport alone
# What a worker has in hand is none of its business: it gets lists of its own, which stay empty.
for name in ("unacked_key", "unacked_index_key", "unacked_mutex_key"):
    app.conf.broker_transport_options[name] = f"_kombu.flower.{name}"
