"""The main act of each of the operator's pages in a real browser, and that none shuts anybody out."""

import json
import re
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import BrowserContext, Page, Route, expect

from dashboard.page import PAGES
from scheduling.store import execute
from tests.acceptance.dashboard_web import ROOT, Visit, WebProcess
from tests.fleet_data import FleetWriter

pytestmark = pytest.mark.acceptance
AXE = ROOT / "dashboard" / "node_modules" / "axe-core" / "axe.min.js"
RUN_AXE = "axe.run(document, {resultTypes: ['violations']}).then(found => JSON.stringify(found.violations))"
THEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


def serious_faults(page: Page) -> list[str]:
    """What axe-core finds on a page, by way of the debugger: the page's own policy lets no foreign script in."""
    debugger = page.context.new_cdp_session(page)
    debugger.send("Runtime.evaluate", {"expression": Path(AXE).read_text()})
    answer = debugger.send("Runtime.evaluate", {"expression": RUN_AXE, "awaitPromise": True})
    found = json.loads(answer["result"]["value"])
    grave = [fault for fault in found if fault["impact"] in ("serious", "critical")]
    return [f"{fault['id']}: {node['html'][:200]}" for fault in grave for node in fault["nodes"]]


DIALOGS = (
    ("/", "Switch policy…"),
    ("/policies/", "Review the change…"),
    ("/fleet/", "Sizing…"),
    ("/fleet/", "Batch size…"),
    ("/alerts/", "Change Long queue"),
    ("/offline/", "Cancel batch_1"),
)
"""Pages, and a button on each that opens a dialog."""


def open_dialog(page: Page, path: str, button: str) -> None:
    page.goto(path)
    expect(page.locator("#connection")).to_have_text("Live")
    if path == "/policies/":
        policy = page.get_by_label("Policy", exact=True)
        policy.select_option("edf" if policy.input_value() == "size" else "size")
    page.get_by_role("button", name=button).first.click()
    expect(page.get_by_role("dialog")).to_be_visible()


@pytest.mark.parametrize("theme", THEMES)
def test_no_dialog_and_no_page_beside_the_navigation_has_a_serious_fault(
    visit: Visit, visitor: BrowserContext, fleet: FleetWriter, theme: Literal["light", "dark"]
) -> None:
    waiting = fleet.enqueue("support", 4)
    page = visit()
    page.emulate_media(color_scheme=theme)
    page.goto("/requests/?state=finished")
    ended = str(
        page.locator("section", has=page.locator("#ended-title")).get_by_role("link").first.get_attribute("href")
    )
    for path in (ended, f"/requests/{waiting}/", "/tokens/"):
        page.goto(path)
        expect(page.locator("#connection")).to_have_text("Live")
        assert serious_faults(page) == [], path
    for path, button in (*DIALOGS, (f"/requests/{waiting}/", "Cancel…")):
        open_dialog(page, path, button)
        assert serious_faults(page) == [], button
    visitor.clear_cookies()
    page.goto("/login/")
    assert serious_faults(page) == [], "login"


@pytest.mark.parametrize("theme", THEMES)
def test_no_page_has_a_serious_fault_of_access_or_an_error(visit: Visit, theme: Literal["light", "dark"]) -> None:
    page = visit()
    page.emulate_media(color_scheme=theme)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    names = [title for _, title in PAGES]
    for title in names:
        page.get_by_role("navigation", name="Pages").get_by_role("link", name=title).click()
        expect(page.locator("#connection")).to_have_text("Live")
        expect(page.locator('nav [aria-current="page"]')).to_contain_text(title)
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


def test_a_waiting_request_is_found_its_wait_explained_and_it_is_cancelled(visit: Visit, fleet: FleetWriter) -> None:
    waiting = fleet.enqueue("support", 4)
    page = visit(path="/requests/")
    row = page.locator("#live-rows tr", has_text=waiting)
    expect(row).to_contain_text("queued")
    row.get_by_role("link").click()
    expect(page.locator(".timeline")).to_contain_text("slots are free")
    page.wait_for_load_state("load")  # the server drew the button; before its scripts have run nobody hears a click
    page.get_by_role("button", name="Cancel…").click()
    page.get_by_role("textbox", name=re.compile("^Reason")).fill("a runaway job")
    page.get_by_role("button", name="Cancel the request").click()
    expect(page.locator("#life .badge")).to_have_text("cancelled")
    expect(page.get_by_role("button", name="Cancel…")).to_have_count(0)


def test_a_button_that_is_pressed_while_its_part_is_drawn_anew_is_still_clicked(
    visit: Visit, fleet: FleetWriter
) -> None:
    waiting = fleet.enqueue("support", 4)
    page = visit(path=f"/requests/{waiting}/")
    held: list[Route] = []
    page.route(f"**/requests/{waiting}/", lambda route: held.append(route))
    with page.expect_request(f"**/requests/{waiting}/"):
        pass
    page.get_by_role("button", name="Cancel…").hover()
    page.mouse.down()
    answer = held[0].fetch()
    with page.expect_response(f"**/requests/{waiting}/"):
        held[0].fulfill(response=answer, body=answer.text().replace("Cancel…", "Cancel now…"))
    page.evaluate("new Promise(requestAnimationFrame)")
    page.mouse.up()
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.locator("#cancel")).to_have_text("Cancel now…")


def test_recorded_requests_are_filtered_and_read_on_by_keyboard(visit: Visit) -> None:
    page = visit(path="/requests/")
    page.get_by_label("State").select_option("failed")
    page.get_by_label("Tenant").fill("support")
    page.keyboard.press("Enter")
    rows = page.locator("section", has=page.locator("#ended-title")).locator("tbody tr")
    expect(rows.first).to_contain_text("support")
    assert set(rows.locator(".badge").all_inner_texts()) == {"failed"}
    page.get_by_role("link", name="Clear").click()
    first = rows.first.inner_text()
    page.get_by_role("link", name="Older →").click()
    expect(page.get_by_role("link", name="← Newest")).to_be_visible()
    assert rows.first.inner_text() != first


def test_a_worker_is_steered_with_a_reason_and_its_answer_is_said(visit: Visit) -> None:
    page = visit(path="/fleet/")
    worker = page.locator("#worker-gpu-0")
    expect(worker).to_contain_text("5 of 16 slots")
    expect(worker).to_contain_text("16, by fixed")
    worker.get_by_role("button", name="Sizing…").click()
    page.get_by_label("Sizing strategy").select_option("latency_first")
    page.get_by_label("decrease", exact=True).locator("visible=true").fill("7")
    page.get_by_role("textbox", name=re.compile("^Reason")).fill("tail latency")
    page.get_by_role("button", name="Change the sizing").click()
    expect(page.locator("#latency_first\\.decrease-problem")).to_have_text(
        "decrease must be a number from 0.1 to 0.99."
    )
    page.get_by_label("decrease", exact=True).locator("visible=true").fill("0.6")
    page.get_by_role("button", name="Change the sizing").click()
    # No engine process listens here: the page says so, and keeps what was typed.
    expect(page.locator("#tune-problem")).to_contain_text("gpu-0 did not confirm")
    expect(page.locator("#tune-reason")).to_have_value("tail latency")


def test_history_is_drawn_compared_and_exported(visit: Visit) -> None:
    page = visit(path="/history/")
    expect(page.locator("#history-state")).to_contain_text("minutes")
    expect(page.locator("#charts canvas")).to_have_count(6)
    expect(page.locator('[data-sum="output_tokens"]')).to_contain_text("mean")
    page.get_by_label("Compare with").select_option("previous")
    page.get_by_role("button", name="Show").click()
    expect(page.locator('[data-sum="completions"]')).to_contain_text("before")
    with page.expect_download() as download:
        page.get_by_role("link", name="Export CSV").click()
    assert Path(download.value.path()).read_text().startswith("start,model,")


def test_tenants_are_drawn_anew_while_one_looks(visit: Visit, fleet: FleetWriter) -> None:
    page = visit(path="/tenants/")
    row = page.locator("#tenants table").first.locator("tr", has_text="nightly")
    expect(row).to_contain_text("of 600")
    expect(page.locator(".jain")).to_contain_text(re.compile(r"0\.\d+|1\.000"))
    request_id = fleet.enqueue("nightly")
    waiting = row.locator("td").nth(1)
    expect(waiting).to_have_text("1")
    execute(fleet.client, fleet.queue.cancel(request_id))


def test_a_change_is_in_the_audit_trail_at_once(visit: Visit) -> None:
    trail = visit(path="/audit/")
    page = visit(path="/policies/")
    page.get_by_label("Policy", exact=True).select_option("fifo")
    page.get_by_role("button", name="Review the change…").click()
    page.get_by_role("textbox", name=re.compile("^Reason")).fill("back to the plain order")
    page.get_by_role("button", name="Switch to fifo").click()
    first = trail.locator("#trail tbody tr").first
    expect(first).to_contain_text("back to the plain order")
    expect(first).to_contain_text("127.0.0.1")


def test_a_guard_is_set_with_the_change_and_its_watch_is_shown(visit: Visit, fleet: FleetWriter) -> None:
    page = visit(path="/policies/")
    page.get_by_label("Policy", exact=True).select_option("size")
    page.locator(".guard summary").click()
    page.get_by_label("Watch", exact=True).select_option("queue_p99_s")
    page.get_by_label("Turn back above (s)").fill("7")
    page.get_by_label("Watch for (seconds)").fill("900")
    page.get_by_role("button", name="Review the change…").click()
    expect(page.get_by_role("dialog")).to_contain_text("turned back if Queue time, p99 goes above 7 s")
    page.get_by_role("textbox", name=re.compile("^Reason")).fill("see whether coalescing helps")
    page.get_by_role("button", name="Switch to size").click()
    expect(page.locator("#in-force .guard-state")).to_contain_text("watching")


def test_a_replay_shows_its_progress_and_then_its_table(visit: Visit, web: WebProcess) -> None:
    page = visit(path="/policies/")
    page.locator("#what-if-form").get_by_label("fair", exact=True).check()
    page.get_by_label("Policy", exact=True).select_option("fair")
    page.get_by_label("level_s", exact=True).locator("visible=true").fill("-1")
    page.get_by_role("button", name="Replay").click()
    expect(page.locator("#what-if-problem")).to_contain_text("fair: level_s must be a number")
    page.get_by_label("level_s", exact=True).locator("visible=true").fill("7")
    page.get_by_role("button", name="Replay").click()
    run = page.locator("#what-if .runs li").first
    expect(run).to_contain_text("queued")
    number = str(run.get_by_role("link").get_attribute("href")).split("run=")[1].split("#")[0]
    web.manage("run_what_if", number)
    expect(run).to_contain_text("done")
    expect(page.locator("#what-if table")).to_contain_text("really happened")
    expect(page.locator("#what-if table")).to_contain_text("By tenant")
    expect(page.locator("#what-if table").get_by_role("columnheader", name="fair, level_s 7")).to_be_visible()


def test_a_token_is_shown_once_and_revoked_with_a_reason(visit: Visit) -> None:
    page = visit()
    page.locator("#account summary").click()
    page.get_by_role("link", name="Your API tokens").click()
    page.get_by_label("What it is for").fill("night job")
    expect(page.get_by_role("button", name="Make a token")).to_be_enabled()
    page.keyboard.press("Enter")
    expect(page.locator("#new-token-text")).to_have_text(re.compile(r"^pso-\w{8}-.{43}$"))
    row = page.locator("#tokens tbody tr", has_text="night job")
    expect(row).to_contain_text("active")
    page.reload()
    expect(page.locator("#new-token-text")).to_be_hidden()
    row.get_by_role("button", name="Revoke night job").click()
    page.get_by_role("textbox", name=re.compile("^Reason")).fill("done with it")
    page.get_by_role("button", name="Revoke the token").click()
    expect(row).to_contain_text("revoked")


def test_a_batch_shows_how_far_it_is_and_is_cancelled(visit: Visit) -> None:
    page = visit(path="/offline/")
    row = page.locator("#work tbody tr").first
    expect(row).to_contain_text("2 of 4 requests, 1 failed, 1 under way")
    row.get_by_role("button", name="Cancel batch_1").click()
    page.get_by_role("textbox", name=re.compile("^Reason")).fill("the wrong file")
    page.get_by_role("button", name="Cancel the batch").click()
    expect(row).to_contain_text("cancelling")
    expect(row.get_by_role("button")).to_have_count(0)
