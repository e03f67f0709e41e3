"""Take the README's picture of a running system's dashboard: `python docs/images/take_screenshot.py VAR URL`.

Run it while `make load` runs.
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WATCH_MS = 25_000


def main() -> None:
    """Sign in, let the charts fill, take the picture."""
    var, url = Path(sys.argv[1]), sys.argv[2]
    secrets = dict(line.split("=", 1) for line in (var / "demo.env").read_text().splitlines() if "=" in line)
    debian = Path("/usr/bin/chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=debian if debian.exists() else None,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{url}/login/")
        page.locator("[name=username]").fill(secrets["OPERATOR_NAME"])
        page.locator("[name=password]").fill(secrets["OPERATOR_PASSWORD"])
        page.keyboard.press("Enter")
        page.wait_for_url(f"{url}/")
        page.wait_for_timeout(WATCH_MS)
        page.screenshot(path=Path(__file__).with_name("dashboard.png"))
        browser.close()


if __name__ == "__main__":
    main()
