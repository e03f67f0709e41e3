"""Django settings of the test run: a data directory of its own, an embedded Redis, SQLite (or DATABASE_URL)."""

import atexit
import os
import shutil
import tempfile

if "PENSTOCK_VAR" not in os.environ:
    os.environ["PENSTOCK_VAR"] = tempfile.mkdtemp(prefix="ps-")
    atexit.register(shutil.rmtree, os.environ["PENSTOCK_VAR"], ignore_errors=True)

from controlplane.settings import *  # noqa: F403

# What makes a password slow to guess takes 0.4 s of every test with an account.
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
