"""No page needs an inline script: the admin's theme and the API's page run in a browser that refuses them."""

import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, expect

from tests.acceptance.dashboard_web import sign_in

pytestmark = pytest.mark.acceptance

PAGES = (
    "/admin/",
    "/admin/scheduling/tenant/",
    "/admin/scheduling/tenant/add/",
    "/admin/inference/requestrecord/",
    "/admin/controlplane/operatortoken/add/",
    "/api/docs",
)


def test_admin_and_api_pages_work_without_inline_scripts(visitor: BrowserContext) -> None:
    page = visitor.new_page()
    problems: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type == "error":
            problems.append(f"{page.url}: {message.text}")

    page.on("console", note)
    page.on("pageerror", lambda error: problems.append(f"{page.url}: {error}"))
    sign_in(page, "ada")
    expect(page.locator("#connection")).to_have_text("Live")
    for path in PAGES:
        answer = page.goto(path)
        assert answer is not None
        assert answer.status == 200, path
        policy = answer.headers["content-security-policy"]
        scripts = next((part for part in policy.split(";") if "script-src" in part), "script-src 'self'")
        assert "unsafe-inline" not in scripts
        if path == "/api/docs":
            page.wait_for_selector(".swagger-ui .opblock")
        else:
            # Alpine has taken up the page's elements, so its expressions run.
            page.wait_for_function("document.querySelector('[x-data]')?._x_dataStack !== undefined")
    page.goto("/admin/")
    page.evaluate("const s = document.createElement('script'); s.text = 'window.inline = 1'; document.body.append(s)")
    assert page.evaluate("window.inline") is None
    assert [problem for problem in problems if "inline" not in problem] == []
    assert len(problems) == 1, problems
