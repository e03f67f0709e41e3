"""URL paths of everything Django answers: the admin, the native API with its documentation, and the dashboard."""

from django.contrib import admin
from django.urls import include, path

from controlplane.api.native import api, unknown_url
from controlplane.api.openai import offline
from controlplane.pages import offline as offline_page
from controlplane.pages import tokens

urlpatterns = [
    path("admin/", admin.site.urls),
    path("api/", api.urls),
    path("api/<path:rest>", unknown_url),
    path("v1/files", offline.files),
    path("v1/files/<str:file_id>", offline.one_file),
    path("v1/files/<str:file_id>/content", offline.file_content),
    path("v1/batches", offline.batches),
    path("v1/batches/<str:batch_id>", offline.one_batch),
    path("v1/batches/<str:batch_id>/cancel", offline.cancel),
    path("v1/<path:rest>", offline.unknown_url),
    path("offline/", offline_page.offline, name="offline"),
    path("offline/<str:batch_id>/cancel/", offline_page.cancel, name="cancel-batch"),
    path("tokens/", tokens.tokens, name="tokens"),
    path("tokens/make/", tokens.make, name="make-token"),
    path("tokens/<int:token_id>/revoke/", tokens.revoke, name="revoke-token"),
    path("", include("dashboard.urls")),
]
