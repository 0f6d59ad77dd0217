"""Photos that are explained: asked for on commit, heard of by signed webhooks, shown in Django's admin.

    pip install 'gradcam-worker[s3]' django standardwebhooks
    export GRADCAM_BROKER_URL=redis://127.0.0.1:6379/0         # and GRADCAM_S3_..., as the worker has them
    export DJANGO_SECRET_KEY=$(openssl rand -hex 32) WEBHOOK_SECRET=whsec_$(openssl rand -base64 32)
    export WEBHOOK_URL=http://127.0.0.1:8000/gradcam/          # where the worker reaches this program
    python django_app.py migrate --run-syncdb
    python django_app.py createsuperuser
    python django_app.py runserver                             # http://127.0.0.1:8000/

The worker is told GRADCAM_WEBHOOK_SECRETS=photos=$WEBHOOK_SECRET, GRADCAM_WEBHOOK_HOSTS=127.0.0.1:8000 and,
as that is no public address, GRADCAM_PRIVATE_NETWORKS=127.0.0.0/8.
"""

import os
import sys
import uuid

import django
from django.apps import AppConfig
from django.conf import settings
from django.contrib import admin
from django.core.exceptions import ImproperlyConfigured
from django.core.management import execute_from_command_line
from django.db import models, transaction
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect
from django.urls import path, reverse
from django.utils.html import format_html, format_html_join
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST
from standardwebhooks import Webhook, WebhookVerificationError

from worker.client import GradcamClient
from worker.contract import FINAL, StatusEvent
from worker.errors import GradcamError, UnknownJob


def needed(name):
    """What is secret, or differs from place to place, stands in the environment."""
    if not os.environ.get(name):
        raise ImproperlyConfigured(f"{name} is not set: {__file__} says in its first lines what belongs there.")
    return os.environ[name]


# settings.py ---------------------------------------------------------------------------------------------
APPS = ("admin", "auth", "contenttypes", "sessions", "messages", "staticfiles")
PROCESSORS = ("template.context_processors.request", "contrib.auth.context_processors.auth", "contrib.messages.context_processors.messages")
settings.configure(
    SECRET_KEY=needed("DJANGO_SECRET_KEY"),
    WEBHOOK_SECRET=needed("WEBHOOK_SECRET"),
    WEBHOOK_URL=needed("WEBHOOK_URL"),
    DEBUG=True,  # on your own machine only
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=[*(f"django.contrib.{app}" for app in APPS), AppConfig("photos", sys.modules[__name__])],
    MIGRATION_MODULES={"photos": None},  # one file has no place for them
    MIDDLEWARE=[
        "django.middleware.security.SecurityMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    ],
    TEMPLATES=[
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "APP_DIRS": True,
            "OPTIONS": {"context_processors": [f"django.{name}" for name in PROCESSORS]},
        }
    ],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": "photos.sqlite3",
            "OPTIONS": {"transaction_mode": "IMMEDIATE"},
        }
    },
    STATIC_URL="static/",
    USE_TZ=True,
)
django.setup()
client = GradcamClient()


# models.py -----------------------------------------------------------------------------------------------
class Photo(models.Model):
    """An image, and what is known of the job about it."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)  # unlike 42 in one database alone
    image = models.CharField(max_length=1000, help_text="s3://bucket/key, which the worker may read")
    added = models.DateTimeField(auto_now_add=True)
    version = models.PositiveIntegerField(default=1, editable=False)  # of the question: another is another job
    job = models.CharField(max_length=36, editable=False)
    revision = models.PositiveIntegerField(default=0, editable=False)  # of the answer: a later one wins
    status = models.CharField(max_length=20, default="new", editable=False)
    classes = models.JSONField(default=list, editable=False)
    error = models.TextField(editable=False)
    manifest = models.TextField(editable=False)

    class Meta:
        ordering = ("-added",)

    def __str__(self):
        return self.image.rpartition("/")[2]

    def save(self, *args, **kwargs):
        """Ask once the row is there for all to see: a webhook may come before this request has ended."""
        super().save(*args, **kwargs)
        transaction.on_commit(self.ask)

    def explain(self):
        """Ask anew."""
        self.version += 1
        self.job, self.revision, self.status, self.classes, self.error, self.manifest = "", 0, "new", [], "", ""
        self.save()

    def ask(self):
        """How is the job? Submits it where nobody knows it yet; harmless, however often it is called."""
        try:
            try:
                document = client.status(self.job)
            except UnknownJob:
                job = client.submit(
                    image=self.image,
                    network="efficientnet_lite0",
                    target={"top_n": 3},
                    artifacts=[{"kind": "overlay", "max_edge": 800}],
                    idempotency_key=f"photo-{self.pk}-{self.version}",
                    metadata={"photo": str(self.pk), "version": str(self.version)},
                    webhooks=[{"url": settings.WEBHOOK_URL, "secret_ref": "photos"}],
                )
                document = client.status(job)
        except GradcamError as error:
            Photo.objects.filter(pk=self.pk, version=self.version).update(error=str(error))
        else:
            hear(document)


def hear(document):
    """Take in what a job's document says, unless a later one has been: one UPDATE, in whatever order they come."""
    known = document.metadata
    Photo.objects.filter(
        pk=known.get("photo"), version=known.get("version"), revision__lte=document.revision
    ).update(
        job=document.id,
        revision=document.revision,
        status=document.status,
        classes=[{"name": one.name.replace("_", " "), "probability": one.probability} for one in document.predictions],
        error=document.error.detail if document.error else "",
        manifest=document.result.manifest_uri if document.result else "",
    )


# views.py ------------------------------------------------------------------------------------------------
@csrf_exempt  # the signature vouches for who it comes from, and is no older than five minutes
@require_POST
def gradcam(request):
    """Hear of a job. Unless the answer is 2xx the worker says it again later, for three days."""
    try:
        event = StatusEvent.model_validate(Webhook(settings.WEBHOOK_SECRET).verify(request.body, request.headers))
    except WebhookVerificationError as error:
        return HttpResponse(f"{error}.", status=401, content_type="text/plain")
    except ValueError:
        return HttpResponse("That is no event of gradcam-worker.", status=400, content_type="text/plain")
    hear(event.data)
    return HttpResponse(status=204)


# admin.py ------------------------------------------------------------------------------------------------
@admin.register(Photo)
class PhotoAdmin(admin.ModelAdmin):
    list_display = ("thumbnail", "image", "status", "outcome")
    ...


urlpatterns = [path("gradcam/", gradcam), path("", admin.site.urls)]
if __name__ == "__main__":
    execute_from_command_line(sys.argv)
