"""The operator's live page in a real browser, against a real web process, database and Redis."""

import re
import signal

import pytest
from playwright.sync_api import BrowserContext, Page, WebSocketRoute, expect

from scheduling.store import execute
from tests.acceptance.dashboard_web import Visit, WebProcess, sign_in
from tests.fleet_data import FleetWriter

pytestmark = pytest.mark.acceptance


def depth(page: Page) -> int:
    figure = page.locator('[data-figure="depth"]')
    expect(figure).to_have_text(re.compile(r"^\d+$"))
    return int(figure.inner_text())


def test_signing_in_leads_to_the_live_page_without_an_error_in_the_console(
    visitor: BrowserContext, fleet: FleetWriter
) -> None:
    page = visitor.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto("/")
    assert page.url.endswith("/login/?next=/")
    sign_in(page, password="wrong")
    expect(page.get_by_role("alert")).to_contain_text("correct username and password")
    sign_in(page)
    expect(page.locator("#connection")).to_have_text("Live")
    in_force = execute(fleet.client, fleet.queue.active_policy())
    expect(page.locator("#policy-name")).to_have_text(in_force.name)
    expect(page.locator(".slot:not(.free)")).to_have_count(5)
    expect(page.locator(".worker .state")).to_contain_text("ready")
    expect(page.locator(".worker")).to_contain_text("host: CPU")
    expect(page.locator("canvas")).to_have_count(4)
    assert problems == []
    assert page.locator("script:not([src])").count() == 0
    assert page.request.get("/").headers["content-security-policy"].startswith("default-src 'self';")


def test_a_web_process_that_can_read_no_model_is_ready_for_the_dashboard_and_says_so(visit: Visit) -> None:
    answer = visit().request.get("/readyz")
    assert answer.status == 200
    models = answer.json()["checks"]["models"]
    assert not models["ok"]
    assert "need the models' directories" in models["detail"] or "No model is offered" in models["detail"]


def test_a_new_request_is_on_the_page_without_a_reload(visit: Visit, fleet: FleetWriter) -> None:
    page = visit()
    before = depth(page)
    for _ in range(3):
        fleet.enqueue("chat", 5)
    expect(page.locator('[data-figure="depth"]')).to_have_text(str(before + 3))
    expect(page.locator("#split tr", has_text="bulk")).to_contain_text("3")
    page.get_by_text("By tenant", exact=True).click()
    expect(page.locator("#split tr", has_text="chat")).to_contain_text("3")


def test_backpressure_shows_its_level_and_why(visit: Visit, fleet: FleetWriter) -> None:
    page = visit()
    while depth(page) < 60:
        for _ in range(60 - depth(page)):
            fleet.enqueue("research", 4)
        expect(page.locator('[data-figure="depth"]')).to_have_text(re.compile(r"^[6-9]\d$"))
    expect(page.locator("#level")).to_contain_text("1 of 4, low")
    expect(page.locator("#level-reason")).to_contain_text("full (6")
    expect(page.locator("#level-reason")).to_contain_text("Refused with 503: bulk.")
    fleet.claim(60)
    expect(page.locator("#level")).to_contain_text("0 of 4, none")


def test_an_operator_switches_with_a_reason_and_sees_every_worker_take_it_up(visit: Visit) -> None:
    page = visit()
    page.get_by_role("button", name="Switch policy…").click()
    page.get_by_role("radio", name=re.compile("^priority")).check()
    page.get_by_role("spinbutton", name="level_s").fill("45")
    page.get_by_role("button", name="Switch to priority").click()
    expect(page.locator("#switch-problem")).to_contain_text("Give a reason")
    page.get_by_role("textbox", name=re.compile("^Reason")).fill("chat must not wait for batch jobs")
    page.get_by_role("button", name="Switch to priority").click()
    expect(page.locator("#policy-name")).to_have_text("priority")
    expect(page.locator("#policy-params")).to_have_text("level_s 45")
    expect(page.locator("#uptake")).to_contain_text(re.compile(r"The worker took up revision \d+ within [\d.]+ m?s"))
    first = page.locator("#actions li").first
    expect(first).to_contain_text("olga switched the policy of demo")
    expect(first).to_contain_text("→ priority (level_s 45)")
    expect(first).to_contain_text("chat must not wait for batch jobs")
    expect(first).to_contain_text("Applied in")


def test_the_policy_can_be_switched_by_keyboard_alone(visit: Visit) -> None:
    page = visit()
    focused = page.locator(":focus")
    for _ in range(40):
        page.keyboard.press("Tab")
        if focused.get_attribute("id") == "switch":
            break
    page.keyboard.press("Enter")
    assert focused.get_attribute("value") == page.locator("#policy-name").inner_text()
    page.keyboard.press("ArrowDown")
    assert page.locator("#switch-dialog").evaluate("dialog => dialog.contains(document.activeElement)")
    chosen = page.locator("input[name=policy]:checked").get_attribute("value")
    while focused.get_attribute("id") != "switch-reason":
        page.keyboard.press("Tab")
    page.keyboard.type("by keyboard")
    while focused.get_attribute("id") != "switch-confirm":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#policy-name")).to_have_text(str(chosen))
    expect(page.locator("#switch-dialog")).not_to_be_visible()
    assert focused.get_attribute("id") == "switch"


def test_a_viewer_sees_everything_and_can_switch_nothing(visit: Visit, fleet: FleetWriter) -> None:
    page = visit("victor")
    expect(page.locator(".slot:not(.free)")).to_have_count(5)
    expect(page.get_by_role("button", name="Switch policy…")).to_have_count(0)
    expect(page.get_by_role("button", name=re.compile("pause|drain", re.I))).to_have_count(0)
    revision = execute(fleet.client, fleet.queue.active_policy()).revision
    token = page.locator("input[name=csrfmiddlewaretoken]").first.get_attribute("value")
    form: dict[str, str | float | bool] = {
        "csrfmiddlewaretoken": str(token),
        "policy": "fair",
        "reason": "none of my business",
    }
    for path in ("/queues/demo/policy/", "/workers/gpu-0/pause/"):
        answer = page.request.post(path, form=form, headers={"Referer": page.url})
        assert answer.status == 403
        assert "operator" in answer.json()["error"]
    assert execute(fleet.client, fleet.queue.active_policy()).revision == revision


def test_an_account_without_a_group_is_refused_in_a_sentence(visitor: BrowserContext) -> None:
    page = visitor.new_page()
    sign_in(page, "nora")
    expect(page.get_by_role("heading", name="You may not do this")).to_be_visible()
    page.goto("/nowhere/")
    expect(page.get_by_role("heading", name="There is no such page")).to_be_visible()


def test_the_page_comes_back_after_a_reload_a_gap_and_a_dropped_socket(
    visitor: BrowserContext, visit: Visit, fleet: FleetWriter
) -> None:
    routes: list[WebSocketRoute] = []
    losses = [0]
    asked: list[str | bytes] = []

    def between(route: WebSocketRoute) -> None:
        server = route.connect_to_server()

        def from_server(message: str | bytes) -> None:
            if losses[0]:
                losses[0] -= 1
            else:
                route.send(message)

        def from_page(message: str | bytes) -> None:
            asked.append(message)
            server.send(message)

        server.on_message(from_server)
        route.on_message(from_page)
        routes.append(route)

    visitor.route_web_socket("**/live/", between)
    page = visit()
    page.reload()
    expect(page.locator("#connection")).to_have_text("Live")
    losses[0] = 1
    before = depth(page)
    fleet.enqueue("chat")
    expect(page.locator('[data-figure="depth"]')).to_have_text(str(before + 1))
    assert asked == ["snapshot"]
    num_sockets = len(routes)
    routes[-1].close()
    fleet.enqueue("chat")
    expect(page.locator('[data-figure="depth"]')).to_have_text(str(before + 2))
    expect(page.locator("#connection")).to_have_text("Live")
    assert len(routes) == num_sockets + 1


def test_a_page_says_when_its_session_has_ended(visitor: BrowserContext) -> None:
    page = visitor.new_page()
    sign_in(page)
    expect(page.locator("#connection")).to_have_text("Live")
    other = visitor.new_page()
    other.goto("/")
    other.locator("#account summary").click()
    other.get_by_role("button", name="Sign out").click()
    expect(page.locator("#banner")).to_contain_text("Your session has ended")
    expect(page.locator("#banner a")).to_have_attribute("href", "/login/?next=%2F")


def test_a_theme_stays_chosen(visit: Visit) -> None:
    page = visit()
    page.locator("#account summary").click()
    page.get_by_role("button", name="Theme").click()
    page.get_by_role("button", name="Theme: light").click()
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 18, 23)"


def test_the_page_fits_a_narrow_screen(visit: Visit) -> None:
    page = visit()
    page.set_viewport_size({"width": 375, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_the_page_shows_stale_figures_and_comes_back_when_the_server_was_restarted(
    visit: Visit, web: WebProcess, fleet: FleetWriter
) -> None:
    page = visit()
    before = depth(page)
    web.stop(signal.SIGKILL)
    expect(page.locator("#banner")).to_contain_text("The feed is stale since")
    expect(page.locator("#connection")).to_have_text("Stale")
    fleet.enqueue("chat")
    web.start()
    expect(page.locator('[data-figure="depth"]')).to_have_text(str(before + 1))
    expect(page.locator("#banner")).to_be_hidden()
    expect(page.locator("#connection")).to_have_text("Live")
