"""For django_app.py, beside which it lies: what every Django project has in its settings.py, you too."""

import logging
import os
import sys
from secrets import token_urlsafe

log = logging.getLogger("django")  # what visitors are not told
ASKED = {  # what is asked of each photo
    "network": "efficientnet_lite0",
    "top_n": 5,
    "artifacts": [{"kind": "overlay", "max_edge": 400}, {"kind": "grid"}],
}
NO_WORKER = "No worker runs just now. The photo is kept, and explained as soon as one does."
TRY_PORT = int(os.environ.get("TRY_PORT", "8001"))  # to which `gradcam dev` sends webhooks
if sys.argv[1:] == ["try"]:
    name, _, secret = os.environ.get("GRADCAM_WEBHOOK_SECRETS", "").partition("=")
    os.environ |= {
        "SECRET_KEY": token_urlsafe(),
        "WEBHOOK_SECRET": secret,
        "WEBHOOK_SECRET_NAME": name,
        "WEBHOOK_URL": f"http://127.0.0.1:{TRY_PORT}/gradcam/",
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
    "WEBHOOK_SECRET_NAME": os.environ.get("WEBHOOK_SECRET_NAME", "photos"),  # as the worker knows it
    "PHOTO_UPLOADS": os.environ.get("GRADCAM_UPLOADS", "").rstrip("/") + "/django",
    "PHOTO_PLACES": [place for place in os.environ.get("PHOTO_PLACES", "").split(",") if place],
    "LARGEST": 16_000_000,  # bytes of a photo
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


def try_out() -> None:
    """A database, somebody who may log in, and a server: what is done once, and by others, in production."""
    from django.contrib.auth import get_user_model
    from django.core.management import call_command

    call_command("migrate", run_syncdb=True, verbosity=0)
    users, password = get_user_model().objects, token_urlsafe(9)
    users.filter(username="admin").delete()
    users.create_superuser("admin", password=password)
    told = f"Log in at http://127.0.0.1:{TRY_PORT}/ as admin with the password {password}"
    print(told, flush=True)  # noqa: T201  # for whoever has started it
    call_command("runserver", str(TRY_PORT), use_reloader=False)
