"""Alerts in a real browser: a rule is changed, it fires on every open page, is acknowledged, and resolves."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.acceptance.dashboard_web import Visit, WebProcess
from tests.acceptance.test_dashboard_pages import THEMES, serious_faults
from tests.fleet_data import FleetWriter

pytestmark = pytest.mark.acceptance
JUDGE = "from dashboard.alerts.watch import watch_alerts; watch_alerts()"
ONLY_QUEUES = "from dashboard.alerts.models import *; AlertRule.objects.exclude(kind='queue').update(enabled=False)"
FORGET = "from dashboard.alerts.models import Alert; Alert.objects.all().delete()"


@pytest.fixture
def judged(web: WebProcess) -> Iterator[None]:
    """Nothing fires for the tests that follow."""
    yield
    web.manage("shell", "-v0", "-c", FORGET)


def empty_queue(fleet: FleetWriter) -> None:
    while requests := fleet.claim(50):
        for request in requests:
            fleet.finish(request)


def change_rule(page: Page) -> None:
    """By keyboard, with an error on the way."""
    page.get_by_role("button", name="Change Long queue").press("Enter")
    dialog = page.get_by_role("dialog")
    threshold = dialog.get_by_label(re.compile("^Fires over"))
    expect(threshold).to_be_focused()
    expect(threshold).to_have_value("100")
    threshold.fill("-1")
    dialog.get_by_label("For at least").fill("0")
    dialog.get_by_label("Resolves after").fill("0")
    dialog.get_by_role("textbox", name=re.compile("^Reason")).fill("to see it fire")
    dialog.get_by_role("button", name="Change the rule").click()
    expect(dialog.locator("#threshold-problem")).to_have_text("Give a number from 0 to 1,000,000.")
    expect(dialog.get_by_label(re.compile("^And over"))).to_be_hidden()
    threshold.fill("2")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#rules tr", has_text="Long queue")).to_contain_text("over 2")


def test_a_rule_fires_on_every_page_is_acknowledged_and_resolves(
    visit: Visit, web: WebProcess, fleet: FleetWriter, judged: None
) -> None:
    page = visit(path="/alerts/")
    expect(page.locator("#rules tbody tr")).to_have_count(11)
    expect(page.locator("#firing")).to_be_hidden()
    change_rule(page)
    elsewhere = visit(path="/audit/")
    for i in range(4):
        fleet.enqueue("support", i)
    web.manage("shell", "-v0", "-c", f"{ONLY_QUEUES}; {JUDGE}")
    expect(elsewhere.locator("#firing")).to_have_text("1 firing")
    expect(elsewhere.locator("#firing")).to_have_attribute("data-unacknowledged", "1")
    row = page.locator("#open tr", has_text="Long queue")
    expect(row).to_contain_text("Add replicas on Fleet")
    for theme in THEMES:
        page.emulate_media(color_scheme=theme)
        assert serious_faults(page) == []
    row.get_by_role("button", name="Acknowledge Long queue").press("Enter")
    page.get_by_role("textbox", name=re.compile("^Note")).fill("a nightly job, ends soon")
    page.get_by_role("dialog").get_by_role("button", name="Acknowledge").click()
    expect(row).to_contain_text("olga")
    expect(row).to_contain_text("a nightly job, ends soon")
    expect(elsewhere.locator("#firing")).to_have_attribute("data-unacknowledged", "0")
    empty_queue(fleet)
    web.manage("shell", "-v0", "-c", JUDGE)
    expect(page.locator("#past tr", has_text="Long queue")).to_contain_text("within the threshold of 2")
    expect(page.locator("#open")).to_contain_text("Nothing is wrong")
    expect(elsewhere.locator("#firing")).to_be_hidden()


def test_a_viewer_sees_alerts_and_rules_and_has_nothing_to_press(visit: Visit) -> None:
    page = visit("victor", "/alerts/")
    expect(page.locator("#rules tbody tr")).to_have_count(11)
    expect(page.locator("main button")).to_have_count(0)
