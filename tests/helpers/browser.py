"""A headless Chromium that looks at pages, where there is one."""

import os
import shutil
from contextlib import contextmanager

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# It looks for updates otherwise; and as root it needs to be told that it may run.
_ARGUMENTS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium():
    """Playwright's browser; skips the test, with the reason, where Playwright or a Chromium is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, _NAMES)), None)
        if found is None and not os.path.exists(playwright.chromium.executable_path):
            pytest.skip(f"no Chromium: none of {', '.join(_NAMES)}, and none that `playwright install chromium` brings")
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=[*_ARGUMENTS, *root])
        try:
            yield browser
        finally:
            browser.close()
