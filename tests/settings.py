"""Django settings of the test run: a data directory of its own, an embedded Redis, SQLite (or DATABASE_URL)."""

import os
import tempfile

_dir = os.environ.setdefault("PENSTOCK_VAR", tempfile.mkdtemp(prefix="ps-"))

from controlplane.settings import *  # noqa: E402, F403
