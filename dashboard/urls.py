"""The operator's pages."""

from django.contrib.auth.views import LoginView, LogoutView
from django.urls import path

from dashboard import views

sign_in = LoginView.as_view(template_name="dashboard/login.html", redirect_authenticated_user=True)

urlpatterns = [
    path("", views.live, name="dashboard"),
    path("login/", sign_in, name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
    path("session/", views.session, name="session"),
    path("queues/<path:model>/policy/", views.switch, name="switch-policy"),
    path("workers/<str:replica>/<str:command>/", views.control, name="control-replica"),
]
