"""URL paths of everything Django answers: the admin, the native API with its documentation, and the dashboard."""

from django.contrib import admin
from django.urls import include, path

from controlplane.api.native import api, unknown_url

urlpatterns = [
    path("admin/", admin.site.urls),
    path("api/", api.urls),
    path("api/<path:rest>", unknown_url),
    path("", include("dashboard.urls")),
]
