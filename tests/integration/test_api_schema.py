"""The native API's document, tried by schemathesis: whatever is sent, no answer is a server's error."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok

from benchmarks.stack import ROOT, Stack, ended, running_stack

MAKE_TOKEN = """
import sys, django
django.setup()
from django.contrib.auth.models import Group, User
from controlplane.tokens import create_token
user = User.objects.create_user("fuzz", password="x")
user.groups.add(Group.objects.get(name="operator"))
print(create_token(user=user, name="fuzz")[1])
"""
EXAMPLES = 8
"""For each operation and caller."""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack({"alpha": {}}) as stack, ended(stack.start_engine()):
        yield stack


@pytest.fixture(scope="module")
def callers(stack: Stack) -> dict[str, str]:
    """Bearers: a tenant's key, an operator's token, and nobody's."""
    done = subprocess.run(
        [sys.executable, "-c", MAKE_TOKEN], cwd=ROOT, env=stack.environment, check=True, capture_output=True, text=True
    )
    return {"key": stack.api_keys["alpha"], "token": done.stdout.strip(), "nobody": "ps-none"}


def test_no_call_is_a_server_error(stack: Stack, callers: dict[str, str]) -> None:
    document = httpx.get(f"{stack.url}/api/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) > 10
    statuses: Counter[int] = Counter()
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
        def try_one(case: Any) -> None:
            for bearer in callers.values():
                response = case.call(base_url=stack.url, headers={"Authorization": f"Bearer {bearer}"})
                case.validate_response(response, checks=[not_a_server_error])
                statuses[response.status_code] += 1

        try_one()
    # It was not turned away at the door alone.
    assert statuses[200] > 10, statuses
    assert {400, 401, 403, 404} <= statuses.keys(), statuses
