"""The operator's pages, and the addresses that their buttons post to."""

from django.contrib.auth.views import LogoutView
from django.urls import path

from dashboard.sign_in import SignInView
from dashboard.views import alerts, audit, commands, fleet, history, live, policies, requests, tenants

urlpatterns = [
    path("", live.live, name="dashboard"),
    path("login/", SignInView.as_view(), name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
    path("session/", live.session, name="session"),
    path("requests/", requests.requests, name="requests"),
    path("requests/<str:request_id>/", requests.life, name="request"),
    path("requests/<str:request_id>/cancel/", commands.cancel, name="cancel-request"),
    path("policies/", policies.policies, name="policies"),
    path("fleet/", fleet.fleet, name="fleet"),
    path("fleet/replicas/", fleet.change, {"act": "add"}, name="add-replica"),
    path("fleet/replicas/<str:replica>/<str:act>/", fleet.change, name="change-replica"),
    path("tenants/", tenants.tenants, name="tenants"),
    path("history/", history.history, name="history"),
    path("history/export/", history.export, name="history-export"),
    path("alerts/", alerts.alerts, name="alerts"),
    path("alerts/<int:alert_id>/acknowledge/", alerts.acknowledge_alert, name="acknowledge-alert"),
    path("alerts/rules/<int:rule_id>/", alerts.edit_rule, name="edit-alert-rule"),
    path("audit/", audit.audit, name="audit"),
    path("audit/export/", audit.export, name="audit-export"),
    path("queues/<path:model>/policy/", commands.switch, name="switch-policy"),
    path("queues/<path:model>/what-if/", commands.what_if, name="what-if"),
    path("workers/<str:replica>/<str:command>/", commands.control, name="control-replica"),
]
