"""The page in a real browser: every picture decodes, nothing is reported as an error, in light and dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
from PIL import Image

from tests.support.commands import command

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="NOT TESTED: chromium is not installed"),
]
# Says what the browser made of the page; appended to a copy, for the page itself holds no script.
ASK = """<script>
window.addEventListener("error", (event) => {
  const found = JSON.parse(document.documentElement.dataset.errors || "[]");
  found.push(event.message || event.target.tagName);
  document.documentElement.dataset.errors = JSON.stringify(found);
}, true);
</script>"""
TELL = """<script>
window.addEventListener("load", () => {
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = JSON.stringify({
    images: [...document.images].map((image) => [image.complete, image.naturalWidth, image.clientWidth]),
    errors: JSON.parse(document.documentElement.dataset.errors || "[]"),
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    background: getComputedStyle(document.body).backgroundColor,
    fetched: performance.getEntriesByType("resource").map((entry) => entry.name).filter((name) => !/^data:/.test(name)),
  });
  document.body.append(told);
});
</script>"""


def chromium(tmp_path, *flags, page):
    line = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
    ]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    finished = subprocess.run(
        [*line, "--v=0", profile, *flags, page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished


def opened(tmp_path, html, *flags):
    """What the browser tells of ``html``, and the lines of its console."""
    page = tmp_path / "asked.html"
    page.write_text(html.replace("<head>", f"<head>{ASK}").replace("</body>", f"{TELL}</body>"))
    finished = chromium(tmp_path, "--dump-dom", "--virtual-time-budget=10000", *flags, page=page)
    told = re.search(r'<pre id="told">(.*?)</pre>', finished.stdout, flags=re.S)
    assert told is not None, finished.stderr[-2000:]
    return json.loads(unescape(told.group(1))), [line for line in finished.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("browser") / "report"
    command("report")([str(recipe), "--out", str(out)])
    return out / "index.html"


@pytest.mark.parametrize(
    ("flags", "background"),
    [
        (["--window-size=1200,900"], "rgb(255, 255, 255)"),
        (["--window-size=500,900", "--blink-settings=preferredColorScheme=0"], "rgb(20, 24, 30)"),
    ],
    ids=["light", "dark and narrow"],
)
def test_it_opens_without_errors_and_with_all_pictures(page, tmp_path, flags, background):
    told, console = opened(tmp_path, page.read_text(), *flags)
    assert len(told["images"]) == page.read_text().count("<img ") == 7
    for complete, natural, shown in told["images"]:
        assert complete
        assert natural > 500
        assert shown > 300
    assert told["errors"] == []
    assert told["fetched"] == []
    assert told["overflow"] <= 0
    assert told["background"] == background
    assert console == []


def test_a_broken_picture_and_an_error_would_be_seen(page, tmp_path):
    broken = re.sub(r"(base64,.{40}).{4000}", r"\1", page.read_text(), count=1)
    assert len(broken) < len(page.read_text())
    broken = broken.replace("</body>", "<script>console.error('seen'); nothing()</script><img src='x.png'></body>")
    told, console = opened(tmp_path, broken)
    assert [told["images"][place][1] for place in (0, -1)] == [0, 0]
    assert sorted(told["errors"]) == ["IMG", "IMG", "Uncaught ReferenceError: nothing is not defined"]
    assert any("seen" in line for line in console)


def test_a_screenshot_is_not_empty(page, tmp_path):
    shot = tmp_path / "shot.png"
    chromium(tmp_path, "--window-size=1200,1600", f"--screenshot={shot}", page=page)
    image = Image.open(shot).convert("RGB")
    assert image.size == (1200, 1600)
    colours = image.getcolors(maxcolors=image.size[0] * image.size[1])
    assert len(colours) > 50
    assert max(count for count, _ in colours) < 0.98 * image.size[0] * image.size[1]
