"""Django's `DATABASES` from one URL: SQLite tuned for many readers and one writer, or PostgreSQL."""

import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

SQLITE_TIMEOUT_S = 20
SQLITE_SETUP = "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA foreign_keys=ON;"
"""WAL lets readers go on while one process writes; with it, NORMAL loses no committed row when a process dies."""


def database_settings(url: str, var: Path) -> dict[str, Any]:
    """The `default` entry of `DATABASES`: PostgreSQL where `url` names one, else SQLite in `var`."""
    return _postgres(url) if url else _sqlite(var / "penstock.sqlite3")


def _sqlite(path: Path) -> dict[str, Any]:
    return {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": path,
        "OPTIONS": {
            # A transaction that began as a reader cannot become the writer while another writes: lock at once.
            "transaction_mode": "IMMEDIATE",
            "timeout": SQLITE_TIMEOUT_S,
            "init_command": SQLITE_SETUP,
        },
        # An in-memory database has no WAL and is not shared with threads of a test.
        "TEST": {"NAME": path.with_name("test.sqlite3")},
    }


def _postgres(url: str) -> dict[str, Any]:
    try:
        parts = urlsplit(url)
        port = parts.port or ""
    except ValueError as error:
        sys.exit(f"DATABASE_URL cannot be read: {error}. It reads postgres://user:password@host:port/name.")
    if parts.scheme not in {"postgres", "postgresql"} or not parts.path.strip("/"):
        sys.exit("DATABASE_URL must read postgres://user:password@host:port/name; SQLite needs no URL, leave it empty.")
    options = dict(parse_qsl(parts.query))
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": unquote(parts.path.strip("/")),
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        # A socket's folder goes into the host part percent-encoded, or into `?host=`.
        "HOST": options.pop("host", "") or unquote(parts.hostname or ""),
        "PORT": port,
        "CONN_MAX_AGE": 60,
        "CONN_HEALTH_CHECKS": True,
        "OPTIONS": {"connect_timeout": 5, **options},
    }
