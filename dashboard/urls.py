"""The operator's pages, and the addresses that their buttons post to."""

from django.contrib.auth.views import LoginView, LogoutView
from django.urls import path

from dashboard.views import commands, live

sign_in = LoginView.as_view(template_name="dashboard/login.html", redirect_authenticated_user=True)

urlpatterns = [
    path("", live.live, name="dashboard"),
    path("login/", sign_in, name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
    path("session/", live.session, name="session"),
    path("queues/<path:model>/policy/", commands.switch, name="switch-policy"),
    path("workers/<str:replica>/<str:command>/", commands.control, name="control-replica"),
]
