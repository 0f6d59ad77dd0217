"""Photos, explained: asked for on commit, heard of by signed webhook, shown in Django's admin. Copy it.

    pip install 'gradcam-worker[s3]' django
    python django_app.py try  # against gradcam dev, in whose environment

or, as in production, with GRADCAM_BROKER_URL, GRADCAM_UPLOADS and GRADCAM_S3_... of the worker:

    export SECRET_KEY=$(openssl rand -hex 32) WEBHOOK_SECRET=whsec_$(openssl rand -base64 32)
    export WEBHOOK_URL=http://127.0.0.1:8000/gradcam/
    export PHOTO_PLACES=s3://photos/in,...  # what may be named by its address; without it, nothing
    python django_app.py migrate --run-syncdb && python django_app.py createsuperuser
    python django_app.py runserver

The worker has GRADCAM_WEBHOOK_SECRETS=photos=$WEBHOOK_SECRET, GRADCAM_WEBHOOK_HOSTS=127.0.0.1:8000 and, as
that is no public address, GRADCAM_PRIVATE_NETWORKS=127.0.0.0/8.
"""

import sys
import uuid

import django
from django import forms
from django.apps import AppConfig
from django.conf import settings
from django.contrib import admin, messages
from django.contrib.auth.decorators import permission_required
from django.core.exceptions import ValidationError
from django.core.management import execute_from_command_line
from django.db import models, transaction
from django.http import HttpResponse
from django.shortcuts import get_object_or_404, redirect
from django.urls import path, reverse
from django.utils.html import format_html
from django.views.decorators import csrf, http
from django_settings import APPS, ASKED, NO_WORKER, OURS, log, try_out

from gradcam_worker.client.client import GradcamClient
from gradcam_worker.client.results import SettingsObjects, is_below, prepare_upload
from gradcam_worker.errors import GradcamError, InvalidWebhook, UriNotAllowed
from gradcam_worker.schemas.status import FINAL
from gradcam_worker.settings import Settings

photos = AppConfig(__name__, sys.modules[__name__])  # this file is an app by itself
photos.label, photos.verbose_name, photos.models_module = "photos", "Photos", photos.module
settings.configure(**OURS, ROOT_URLCONF=__name__, INSTALLED_APPS=[*APPS, photos])
django.setup()
client = GradcamClient()
objects = SettingsObjects(Settings.from_environment())  # the bucket of uploads


# models.py
class Photo(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    image = models.CharField(max_length=1000, blank=True, help_text="s3://bucket/key")
    name = models.CharField(max_length=200, blank=True)  # the file's, for people
    version = models.PositiveIntegerField(default=1)  # of the question: each is one job
    job = models.CharField(max_length=36)
    revision = models.PositiveIntegerField(default=0)  # of the answer: the latest counts
    status = models.CharField(max_length=20, default="new")
    classes = models.JSONField(default=list)
    error = models.TextField()
    manifest = models.TextField()

    def __str__(self):
        return self.name or self.image.rpartition("/")[2]

    def save(self, *args, **kwargs):
        super().save(*args, **kwargs)
        if self.status not in FINAL:
            transaction.on_commit(self.ask)  # no sooner: the answer may come before this request has ended

    def clean(self):  # the worker can read more than whoever adds a photo may see
        if not any(is_below(self.image, place) for place in (settings.PHOTO_UPLOADS, *settings.PHOTO_PLACES)):
            raise ValidationError(UriNotAllowed.public_message if self.image else "Choose a photo.")

    def ask(self):
        """How is the job? Where there is none yet, submit it. Harmless, however often it is called."""
        try:
            if self.job not in client.statuses([self.job]):
                self.job = client.submit(
                    **ASKED,
                    image=self.image,
                    idempotency_key=f"photo-{self.pk}-{self.version}",  # submitted twice, it runs once
                    metadata={"photo": str(self.pk), "version": str(self.version)},
                    webhooks=[{"url": settings.WEBHOOK_URL, "secret_ref": settings.WEBHOOK_SECRET_NAME}],
                )
            self.hear(client.status(self.job))
        except GradcamError as error:
            log.warning("photo %s: %s", self.pk, error)
            Photo.objects.filter(pk=self.pk, version=self.version).update(error=error.public_message)

    @staticmethod
    def hear(document):
        """Take in what is told of a job, twice or late as it may be: one UPDATE; the last revision wins."""
        about = document.metadata
        photo = Photo.objects.filter(pk=about.get("photo"), version=about.get("version"))
        photo.filter(revision__lte=document.revision).update(
            job=document.id,
            revision=document.revision,
            status=document.status,
            classes=[[one.name.replace("_", " "), one.probability] for one in document.predictions[:5]],
            error=document.error.public_message if document.error else "",
            manifest=document.result.manifest_uri if document.result else "",
        )


# views.py
@csrf.csrf_exempt  # it is signed, and not five minutes ago
@http.require_POST
def webhook(request):
    """The worker tells how a job ended; unless the answer is 2xx it tells again, for three days."""
    try:
        event = client.webhooks.unwrap(request.body, request.headers, settings.WEBHOOK_SECRET)
    except InvalidWebhook:
        return HttpResponse("This is no event, not signed by our worker, or old.", status=401)
    Photo.hear(event.data)
    return HttpResponse(status=204)


@permission_required("photos.view_photo", raise_exception=True)
def picture(request, pk, large):
    """Lead to a picture, at an address in the bucket that is good for an hour."""
    photo = get_object_or_404(Photo, pk=pk)
    try:
        result = client.result(photo.job, manifest_uri=photo.manifest)
    except GradcamError as error:
        return HttpResponse(error.public_message, status=502, content_type="text/plain")
    made = result.manifest.artifacts if large else result.manifest.explanations[0].artifacts
    return redirect(result.urls[made[0].uri])


# forms.py
class PhotoForm(forms.ModelForm):
    file = forms.FileField(label="Photo", required=False, help_text="JPEG, PNG, WebP, GIF or BMP.")

    def clean(self):
        """Store the file below our own prefix; its place there is the photo's address."""
        cleaned = super().clean()
        if cleaned.get("file"):
            try:
                upload = prepare_upload(cleaned["file"].read(), settings.PHOTO_UPLOADS, settings.LARGEST)
                objects.put(upload.uri, upload.data, upload.media_type)
            except GradcamError as error:
                log.warning("upload: %s", error)
                raise ValidationError(error.public_message) from error
            self.instance.image = cleaned["image"] = upload.uri
            self.instance.name = cleaned["file"].name[:200]
        return cleaned


# admin.py and urls.py
@admin.register(Photo)
class PhotoAdmin(admin.ModelAdmin):
    list_display = list_display_links = ("thumbnail", "__str__", "status", "outcome")
    readonly_fields = ("status", "outcome", "pictures")
    ordering, actions = ("-job",), ("explain_again", "cancel")  # a job's id begins with the time
    form = PhotoForm

    def get_fields(self, request, photo=None):
        if photo:
            return ("image", *self.readonly_fields)
        return ("file", "image") if settings.PHOTO_PLACES else ("file",)

    def save_model(self, request, photo, form, change):
        super().save_model(request, photo, form, change)
        try:
            if not client.workers():
                messages.warning(request, NO_WORKER)
        except GradcamError as error:
            log.warning("workers: %s", error)  # whether the job was taken is told by the photo itself

    def has_change_permission(self, request, photo=None):
        return False  # another image is another photo

    @admin.action(description="Explain again; ask how it is where it is not done", permissions=["add"])
    def explain_again(self, request, photos):
        new = {"version": models.F("version") + 1, "revision": 0, "job": "", "status": "new"}
        photos.filter(status__in=FINAL).update(**new)
        for photo in photos:
            photo.ask()

    @admin.action(description="Cancel", permissions=["add"])
    def cancel(self, request, photos):
        for photo in photos.exclude(job="").exclude(status__in=FINAL):
            Photo.hear(client.cancel(photo.job))

    def outcome(self, photo):
        return photo.error or "".join("{}, {:.0%}".format(*best) for best in photo.classes[:1])

    def thumbnail(self, photo, height="60px", large=0):
        html = '<img src="{}" alt="{}" style="max-width: 100%; max-height: {}" loading="lazy">'
        url = reverse("picture", args=(photo.pk, large))
        return format_html(html, url, self.outcome(photo), height) if photo.manifest else ""

    def pictures(self, photo):
        return self.thumbnail(photo, "75vh", large=1)


pictures = path("picture/<uuid:pk>/<int:large>/", picture, name="picture")
urlpatterns = [path("gradcam/", webhook), pictures, path("", admin.site.urls)]
if __name__ == "__main__":
    try_out() if sys.argv[1:] == ["try"] else execute_from_command_line(sys.argv)
