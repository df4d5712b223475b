"""Pages in a headless browser: their width, and what axe, the checker of accessibility, finds in them."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
# A browser is a program of the system that no Python package brings.
needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
PHONE, DESKTOP = (390, 800), (1280, 900)
DARK = ("--blink-settings=preferredColorScheme=0",)


def shown(page: Path, script: str, folder: Path, size: tuple[int, int] = DESKTOP, flags: tuple[str, ...] = ()) -> str:
    """The document of ``page`` after ``script`` has run at its end, as HTML."""
    assert BROWSER is not None
    copy = folder / "page.html"
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            f"--user-data-dir={folder / 'browser'}", f"--window-size={size[0]},{size[1]}", "--virtual-time-budget=60000",
            *flags, "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    return done.stdout


def violations(page: Path, folder: Path, size: tuple[int, int] = DESKTOP, flags: tuple[str, ...] = ()) -> list[Any]:
    """The rules of axe that ``page`` breaks, each with the elements that break it."""
    axe = (resources.files("axe_core_python") / "axe.min.js").read_text().replace("</script", "<\\/script")
    found = "r.violations.map(v => [v.id, v.help, v.nodes.map(n => n.html.slice(0, 200))])"
    write = f"const p = document.createElement('pre'); p.id = 'axe'; p.textContent = JSON.stringify({found});"
    told = shown(page, f"{axe}; axe.run(document).then(r => {{{write} document.body.appendChild(p)}})", folder, size, flags)
    result = re.search(r'<pre id="axe">(.*?)</pre>', told, re.DOTALL)
    assert result is not None, told[-500:]
    broken: list[Any] = json.loads(html.unescape(result[1]))
    return broken
