"""A headless Chromium for the report page: the system's own, driven by its own chromedriver; nothing is downloaded."""

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

READY_S = 60.0
_LOADS = itertools.count()


def chromium() -> str | None:
    """The browser on the PATH, if its driver is there too."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return found if shutil.which("chromedriver") else None


@contextlib.contextmanager
def open_browser(width: int = 1400, height: int = 1000) -> Iterator["Chrome"]:
    """A browser with a log of its console and of its requests.

    Raises:
        FileNotFoundError: there is no Chromium with its driver.
    """
    from selenium import webdriver  # not in every environment that collects the tests
    from selenium.webdriver.chrome.service import Service

    found, driver = chromium(), shutil.which("chromedriver")
    if found is None or driver is None:
        raise FileNotFoundError(
            "chromium and chromedriver are not on the PATH: apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for flag in (
        "headless=new",
        "disable-gpu",
        "disable-dev-shm-usage",
        "hide-scrollbars",
        f"window-size={width},{height}",
    ):
        options.add_argument(f"--{flag}")
    if os.getuid() == 0:
        options.add_argument("--no-sandbox")  # which Chromium refuses to set up for root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    browser.set_page_load_timeout(READY_S)
    browser.set_script_timeout(READY_S)
    try:
        yield browser
    finally:
        browser.quit()


def open_page(browser: "Chrome", page: Path, address: str = "") -> float:
    """Load `page` anew and wait until its first view is drawn; the seconds that the page itself counted until then."""
    # A query of its own, because a change of what follows `#` alone loads nothing.
    browser.get(f"{page.absolute().as_uri()}?{next(_LOADS)}{address}")
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        ready = browser.execute_script("return document.body.dataset.ready")
        if ready is not None:
            return float(ready) / 1000
        time.sleep(0.02)
    raise TimeoutError(f"{page}{address} was not drawn within {READY_S:.0f} s")
