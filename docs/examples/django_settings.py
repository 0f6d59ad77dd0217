"""For django_app.py, beside which it lies: what every Django project has in its settings.py, you too."""

import logging
import os
import sys

log = logging.getLogger("django")  # what visitors are not told
WISH = {  # what is asked of each photo
    "network": "efficientnet_lite0",
    "target": {"top_n": 5},
    "artifacts": [{"kind": "overlay", "max_edge": 400}, {"kind": "grid"}],
}
NEEDED = ("SECRET_KEY", "WEBHOOK_SECRET", "WEBHOOK_URL")
if not all(map(os.environ.get, NEEDED)):
    sys.exit(f"{', '.join(NEEDED)} must be set in the environment: the first lines of django_app.py say how.")

APPS = [
    f"django.contrib.{app}"
    for app in ("admin", "auth", "contenttypes", "sessions", "messages", "staticfiles")
]
LAYERS = ("sessions.middleware.Session", "auth.middleware.Authentication", "messages.middleware.Message")
SEEN = (
    "contrib.auth.context_processors.auth",
    "contrib.messages.context_processors.messages",
    "template.context_processors.request",
)
OURS = {
    **{name: os.environ[name] for name in NEEDED},
    "PHOTO_PLACES": os.environ.get("PHOTO_PLACES", "").split(","),
    "DEBUG": True,  # to try it
    "STATIC_URL": "static/",
    "MIGRATION_MODULES": {"photos": None},
    "MIDDLEWARE": [f"django.contrib.{layer}Middleware" for layer in LAYERS],  # the admin sees to CSRF itself
    "TEMPLATES": [
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "APP_DIRS": True,
            "OPTIONS": {"context_processors": [f"django.{one}" for one in SEEN]},
        }
    ],
    "DATABASES": {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "photos.sqlite3"}},
}
