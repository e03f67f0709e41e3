"""The native API's document, tried by schemathesis: whatever is sent, no answer is a server's error."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok

from benchmarks.stack import ROOT, Stack, ended, running_stack

MAKE_OPERATORS = """
import django
django.setup()
from django.contrib.auth.models import Group, User
from django.test import Client
from controlplane.tokens import create_token
users = [User.objects.create_user(name, password="x") for name in ("token", "session")]
for user in users:
    user.groups.add(Group.objects.get(name="operator"))
print(create_token(user=users[0], name="fuzz")[1])
client = Client()
client.force_login(users[1])
print(client.cookies["sessionid"].value)
"""
EXAMPLES = 8
"""For each operation and caller."""
CSRF = "f" * 32


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack({"alpha": {}}) as stack, ended(stack.start_engine()):
        yield stack


def test_no_call_is_a_server_error(stack: Stack) -> None:
    statuses = try_all_calls(stack)
    # It was not turned away at the door alone.
    assert sum(statuses["session"][code] for code in (200, 201)) > 10, statuses
    assert {400, 401, 403, 404} <= set().union(*statuses.values()), statuses


def try_all_calls(stack: Stack, examples: int = EXAMPLES) -> dict[str, Counter[int]]:
    """Fails where one ends with a server's error; statuses by caller."""
    callers = make_callers(stack)
    schema = schemathesis.openapi.from_dict(httpx.get(f"{stack.url}/api/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) > 10
    statuses: dict[str, Counter[int]] = {name: Counter() for name in callers}
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(max_examples=examples, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
        def try_one(case: Any) -> None:
            is_new = True
            while is_new:
                for name, headers in callers.items():
                    response = case.call(base_url=stack.url, headers=headers)
                    case.validate_response(response, checks=[not_a_server_error])
                    statuses[name][response.status_code] += 1
                is_new = append_nul(case)

        try_one()
    return statuses


def make_callers(stack: Stack) -> dict[str, Mapping[str, str]]:
    """Headers of a tenant's key, an operator's token, an operator's session, and nobody."""
    done = subprocess.run(
        [sys.executable, "-c", MAKE_OPERATORS],
        cwd=ROOT,
        env=stack.environment,
        check=True,
        capture_output=True,
        text=True,
    )
    token, session = done.stdout.split()
    bearers = {"key": stack.api_keys["alpha"], "token": token, "nobody": "ps-none"}
    cookies = f"sessionid={session}; csrftoken={CSRF}"
    return {
        **{name: {"Authorization": f"Bearer {bearer}"} for name, bearer in bearers.items()},
        "session": {"Cookie": cookies, "X-CSRFToken": CSRF},
    }


def append_nul(case: Any) -> bool:
    """Put a NUL behind each text of a call's address where any text may stand: PostgreSQL takes none.

    Whether there was one that had none yet.
    """
    parameters = case.operation.definition.raw.get("parameters", ())
    is_new = False
    free = {one["name"] for one in parameters if not {"enum", "pattern", "format", "$ref"} & one["schema"].keys()}
    for values in (case.query, case.path_parameters):
        for name in free & (values or {}).keys():
            if isinstance(values[name], str) and not values[name].endswith("\0"):
                values[name] += "\0"
                is_new = True
    return is_new
