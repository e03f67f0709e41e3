"""Django settings, made from the typed configuration of `controlplane.config`."""

import os
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from django.templatetags.static import static
from django.urls import reverse_lazy

from controlplane.config import ROOT, Config, load_config
from controlplane.database import database_settings

PENSTOCK: Config = load_config()
for _folder in (PENSTOCK.var, PENSTOCK.var / "static"):
    _folder.mkdir(parents=True, exist_ok=True)


def _secret_key(var: Path) -> str:
    """The generated key under `var`; the first process to come makes it, readable by this user alone."""
    path = var / "secret_key"
    if not path.exists():
        draft = var / f".secret_key.{os.getpid()}"
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(50))
        try:
            os.link(draft, path)  # unlike a rename, this fails where another process was first
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text()


def _broker(url: str) -> str:
    """Kombu's spelling of a Redis URL. With TLS it would check no certificate unless told to; redis-py always does."""
    parts = urlsplit(url)
    if parts.scheme == "rediss" and "ssl_cert_reqs" not in dict(parse_qsl(parts.query)):
        return f"{url}{'&' if parts.query else '?'}ssl_cert_reqs=required"
    if parts.scheme != "unix":
        return url
    login = f"{parts.username or ''}:{parts.password}@" if parts.password else ""
    return f"redis+socket://{login}{parts.path}?virtual_host={dict(parse_qsl(parts.query)).get('db', '0')}"


SECRET_KEY = PENSTOCK.secret_key or _secret_key(PENSTOCK.var)
DEBUG = PENSTOCK.debug
ALLOWED_HOSTS = PENSTOCK.allowed_hosts
CSRF_TRUSTED_ORIGINS = PENSTOCK.trusted_origins

INSTALLED_APPS = [
    "unfold.apps.BasicAppConfig",
    "unfold.contrib.filters",
    "controlplane.apps.PenstockAdminConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "channels",
    "ninja",
    "scheduling",
    "inference",
    "dashboard",
    "controlplane.apps.ControlPlaneConfig",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "controlplane.security.security_policy",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "dashboard.origin.remember_origin",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "controlplane.urls"
ASGI_APPLICATION = "controlplane.asgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [ROOT / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

# Database

DATABASES = {"default": database_settings(PENSTOCK.database_url, PENSTOCK.var)}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# Signing in

LOGIN_URL = "/login/"
LOGIN_REDIRECT_URL = "/"
LOGOUT_REDIRECT_URL = "/login/"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in ("UserAttributeSimilarityValidator", "MinimumLengthValidator", "CommonPasswordValidator")
]

# Security. Cookies are marked secure where the dashboard is reached over https. Which proxies are believed about
# address and scheme of a client, the server decides (`PENSTOCK_PROXIES`): Django would believe anybody.

_https = any(origin.startswith("https://") for origin in CSRF_TRUSTED_ORIGINS)
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_SECURE = _https
CSRF_COOKIE_SAMESITE = "Lax"
CSRF_COOKIE_SECURE = _https
SECURE_HSTS_SECONDS = 365 * 86400 if _https else 0
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"
DATA_UPLOAD_MAX_MEMORY_SIZE = PENSTOCK.max_body_bytes

# Time and language

LANGUAGE_CODE = "en-us"
USE_I18N = False
USE_TZ = True
TIME_ZONE = "UTC"
FORMAT_MODULE_PATH = "controlplane.formats"

# Static files: whitenoise serves them straight from their folders, so that nothing has to be collected first.

_node_modules = ROOT / "dashboard" / "node_modules"
_static_folders: list[tuple[str, Path]] = [("", ROOT / "static"), ("vendor/uplot", _node_modules / "uplot" / "dist")]
STATIC_URL = "/static/"
STATIC_ROOT = PENSTOCK.var / "static"
STATICFILES_DIRS: list[Any] = [
    (prefix, folder) if prefix else folder for prefix, folder in _static_folders if folder.is_dir()
]
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = DEBUG

# Channels (the dashboard's sockets)

CHANNEL_LAYERS = {
    "default": {
        "BACKEND": "channels_redis.core.RedisChannelLayer",
        "CONFIG": {"hosts": [PENSTOCK.redis], "prefix": f"{PENSTOCK.key_prefix}:channels", "capacity": 200},
    }
}

# E-mail of alerts

EMAIL_HOST = PENSTOCK.email_host
EMAIL_PORT = PENSTOCK.email_port
EMAIL_HOST_USER = PENSTOCK.email_user
EMAIL_HOST_PASSWORD = PENSTOCK.email_password
EMAIL_USE_TLS = PENSTOCK.email_security == "starttls"
EMAIL_USE_SSL = PENSTOCK.email_security == "tls"
EMAIL_TIMEOUT = 10
DEFAULT_FROM_EMAIL = PENSTOCK.email_from

# Celery: control of the gpu workers, and the periodic tasks of the ops worker. No request of a client travels by it.

CELERY_BROKER_URL = _broker(PENSTOCK.redis)
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None
CELERY_BROKER_TRANSPORT_OPTIONS = {"global_keyprefix": f"{PENSTOCK.key_prefix}:celery:", "socket_keepalive": True}
CELERY_RESULT_BACKEND = None
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_ACKS_LATE = False
CELERY_TASK_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
# A worker that names no queue is a gpu worker; it must never take a periodic task, least of all one for the database.
CELERY_TASK_DEFAULT_QUEUE = "gpu"
CELERY_TASK_ROUTES = {
    "inference.tasks.*": {"queue": "ops"},
    "dashboard.tasks.*": {"queue": "ops"},
    "controlplane.tasks.*": {"queue": "ops"},
}
CELERY_TASK_CREATE_MISSING_QUEUES = True
CELERY_TIMEZONE = "UTC"
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_BEAT_SCHEDULE_FILENAME = str(PENSTOCK.var / "beat-schedule")


def _every(seconds: float, task: str) -> dict[str, Any]:
    """A beat entry. What was not begun within three periods is dropped: the next one does its work."""
    return {"task": task, "schedule": seconds, "options": {"queue": "ops", "expires": max(2.0, 3 * seconds)}}


CELERY_BEAT_SCHEDULE = {
    "write-history": _every(0.5, "inference.tasks.write_history"),
    "sweep": _every(1, "inference.tasks.sweep"),
    "free-slots": _every(30, "inference.tasks.free_slots"),
    "reconcile-policies": _every(2, "inference.tasks.reconcile_policies"),
    "adapt-policies": _every(2, "inference.tasks.adapt_policies"),
    "publish-deployments": _every(5, "inference.tasks.publish_deployments"),
    "record-replicas": _every(5, "inference.tasks.record_replicas"),
    "run-offline-work": _every(1, "controlplane.tasks.run_offline_work"),
    "remove-orphaned-files": _every(3600, "controlplane.tasks.remove_orphaned_files"),
    "prune-history": _every(3600, "inference.tasks.prune_history"),
    "roll-up-history": _every(5, "dashboard.tasks.roll_up_history"),
    "watch-switches": _every(1, "dashboard.tasks.watch_switches"),
    "tell-of-life": _every(5, "dashboard.tasks.tell_of_life"),
    "judge-alerts": _every(5, "dashboard.tasks.judge_alerts"),
    "deliver-notices": _every(2, "dashboard.tasks.deliver_notices"),
    "forget-old-rollups": _every(3600, "dashboard.tasks.forget_old_rollups"),
}

# Logging: lines on stderr, which the supervisor prefixes.

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"chosen": {"()": "inference.logs.make_formatter", "kind": PENSTOCK.log_format}},
    "filters": {
        "beat": {"()": "inference.logs.OutageFilter", "who": "Periodic tasks wait"},
        "consumer": {"()": "inference.logs.OutageFilter", "who": "The worker hears no commands and takes no tasks"},
    },
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "chosen"}},
    "root": {"handlers": ["stderr"], "level": PENSTOCK.log_level},
    "loggers": {
        "django.server": {"level": "WARNING"},
        "django.db.backends": {"level": "INFO"},
        # Beat announces each of its many runs.
        "celery.beat": {"level": "WARNING", "filters": ["beat"]},
        "celery.worker.consumer.consumer": {"filters": ["consumer"]},
        "celery.worker.strategy": {"level": "WARNING"},
        "celery.app.trace": {"level": "WARNING"},
    },
}

# Admin's theme

# Keys are shown once, in a message; in a cookie it leaves no trace on the server.
MESSAGE_STORAGE = "django.contrib.messages.storage.cookie.CookieStorage"

_BLUE = {
    "50": "#f2f7fd", "100": "#e6f0fb", "200": "#c7ddf6", "300": "#9cc4f0", "400": "#6db3ff", "500": "#2f7fd6",
    "600": "#1559a8", "700": "#124c90", "800": "#113f75", "900": "#12365f", "950": "#0b2340",
}  # fmt: skip


def _page(title: str, icon: str, model: str) -> dict[str, Any]:
    """A line of the admin's side bar, for those who may see the model."""
    app, name = model.split(".")
    return {
        "title": title,
        "icon": icon,
        "link": reverse_lazy(f"admin:{app}_{name}_changelist"),
        "permission": lambda request: request.user.has_perm(f"{app}.view_{name}"),
    }


UNFOLD = {
    "SITE_TITLE": "Penstock",
    "SITE_HEADER": "Penstock",
    "SITE_SUBHEADER": "Administration",
    "SITE_URL": "/",
    "SITE_ICON": lambda request: static("penstock.svg"),
    "SITE_FAVICONS": [{"rel": "icon", "type": "image/svg+xml", "href": lambda request: static("penstock.svg")}],
    "SHOW_HISTORY": True,
    "SHOW_VIEW_ON_SITE": True,
    "BORDER_RADIUS": "6px",
    "STYLES": [lambda request: static("css/admin.css")],
    "COLORS": {"primary": _BLUE},
    "SIDEBAR": {
        "show_search": False,
        "navigation": [
            {
                "items": [
                    {"title": "Live dashboard", "icon": "monitoring", "link": "/", "active": lambda request: False}
                ]
            },
            {
                "title": "Who may send what",
                "items": [
                    _page("Tenants", "groups", "scheduling.tenant"),
                    _page("API keys", "key", "scheduling.apikey"),
                    _page("Latency targets", "timer", "scheduling.servicelevel"),
                ],
            },
            {
                "title": "What serves it",
                "items": [
                    _page("Deployments", "deployed_code", "inference.modeldeployment"),
                    _page("Replicas", "memory", "inference.replica"),
                    _page("Wanted replicas", "rule", "inference.wantedreplica"),
                    _page("Policy switches", "swap_vert", "scheduling.policyrevision"),
                ],
            },
            {
                "title": "What happened",
                "items": [
                    _page("Requests", "receipt_long", "inference.requestrecord"),
                    _page("Batches", "stacked_bar_chart", "inference.batchrecord"),
                    _page("Audit trail", "history", "scheduling.operatoraction"),
                ],
            },
            {
                "title": "What says so",
                "items": [
                    _page("Alert rules", "rule", "dashboard.alertrule"),
                    _page("Alert channels", "campaign", "dashboard.alertchannel"),
                    _page("Alerts", "notifications", "dashboard.alert"),
                    _page("Alert deliveries", "outgoing_mail", "dashboard.delivery"),
                ],
            },
            {
                "title": "Who may sign in",
                "items": [
                    _page("Users", "person", "auth.user"),
                    _page("Groups", "group_work", "auth.group"),
                    _page("API tokens", "token", "controlplane.operatortoken"),
                ],
            },
        ],
    },
}
