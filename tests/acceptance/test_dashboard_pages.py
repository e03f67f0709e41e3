"""The main act of each of the operator's pages in a real browser, and that none shuts anybody out."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from dashboard.page import PAGES
from scheduling.store import execute
from tests.acceptance.dashboard_web import ROOT, Visit
from tests.fleet_data import FleetWriter

pytestmark = pytest.mark.acceptance
AXE = ROOT / "dashboard" / "node_modules" / "axe-core" / "axe.min.js"
RUN_AXE = "axe.run(document, {resultTypes: ['violations']}).then(found => JSON.stringify(found.violations))"


def serious_faults(page: Page) -> list[str]:
    """What axe-core finds on a page, by way of the debugger: the page's own policy lets no foreign script in."""
    debugger = page.context.new_cdp_session(page)
    debugger.send("Runtime.evaluate", {"expression": Path(AXE).read_text()})
    answer = debugger.send("Runtime.evaluate", {"expression": RUN_AXE, "awaitPromise": True})
    found = json.loads(answer["result"]["value"])
    grave = [fault for fault in found if fault["impact"] in ("serious", "critical")]
    return [f"{fault['id']}: {node['html'][:200]}" for fault in grave for node in fault["nodes"]]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_page_has_a_serious_fault_of_access_or_an_error(visit: Visit, theme: str) -> None:
    page = visit()
    page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    names = [title for _, title in PAGES]
    for title in names:
        page.get_by_role("navigation", name="Pages").get_by_role("link", name=title).click()
        expect(page.locator("#connection")).to_have_text("Live")
        expect(page.locator('nav [aria-current="page"]')).to_have_text(title)
        assert serious_faults(page) == [], title
        assert page.locator("script:not([src])").count() == 0
        page.set_viewport_size({"width": 375, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, title
        page.set_viewport_size({"width": 1400, "height": 1000})
    assert problems == []


def test_parameters_are_changed_live_with_a_reason_and_errors_stand_at_their_field(
    visit: Visit, fleet: FleetWriter
) -> None:
    page = visit(path="/policies/")
    page.get_by_label("Policy", exact=True).select_option("wrr")
    field = page.get_by_label("high", exact=True)
    field.fill("5000")
    expect(page.locator(".kind:not([hidden]) .field-problem:not([hidden])")).to_have_text(
        "high must be a number from 0.01 to 1000."
    )
    page.get_by_role("button", name="Review the change…").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    field.fill("60")
    page.get_by_role("button", name="Review the change…").click()
    expect(page.get_by_role("dialog")).to_contain_text("high 60")
    page.get_by_role("textbox", name=re.compile("^Reason")).fill("classes share by weight")
    page.get_by_role("button", name="Switch to wrr").click()
    expect(page.locator("#policy-name")).to_have_text("wrr")
    row = page.locator("#revisions tbody tr").first
    expect(row).to_contain_text("olga")
    expect(row).to_contain_text("classes share by weight")
    expect(row).to_contain_text("in force")
    active = execute(fleet.client, fleet.queue.active_policy())
    assert (active.name, active.params["high"]) == ("wrr", 60)
    expect(page.get_by_role("button", name="Review the change…")).to_be_disabled()


def test_times_are_in_the_readers_zone(visit: Visit) -> None:
    page = visit(path="/policies/")
    title = page.locator("#revisions time").first.get_attribute("title")
    zone = page.evaluate("Intl.DateTimeFormat().resolvedOptions().timeZone")
    assert str(title).endswith(f" {zone}")


def test_a_viewer_reads_the_form_and_cannot_change_it(visit: Visit) -> None:
    page = visit("victor", "/policies/")
    expect(page.get_by_label("Policy", exact=True)).to_be_disabled()
    expect(page.get_by_role("button", name="Review the change…")).to_have_count(0)
