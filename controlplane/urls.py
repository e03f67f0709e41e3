"""URL paths of everything Django answers: the admin, the native API with its documentation, and the dashboard."""

from django.contrib import admin
from django.urls import include, path

from controlplane.api.native import api

urlpatterns = [
    path("admin/", admin.site.urls),
    path("api/", api.urls),
    path("", include("dashboard.urls")),
]
