"""A page in headless Chromium: what it asks the network for, what it logs, which images decode, a picture of it."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PROBE = """<script>addEventListener("load", () => { document.title = "PROBE" + JSON.stringify(
  [...document.images].map(image => [image.alt, image.naturalWidth, image.getBoundingClientRect().right])) +
  "|" + document.documentElement.scrollWidth + "|"; });</script>"""


@dataclass(frozen=True)
class Seen:
    requests: list[str]
    """URLs that the page asked for, its own file and data: aside."""
    console: list[str]
    """Lines of the console: errors of scripts, and what the page's policy blocked."""
    images: dict[str, int]
    """Images that decoded, by alt text, with their width in pixels."""
    width: int
    """Pixels that the page takes in a window of 1220."""


def look_at(page: Path, work: Path) -> Seen:
    """Opens the page as it is, and a copy with a script that measures its images."""
    net_log = work / "net.json"
    opened = _chromium(work, page, f"--log-net-log={net_log}", "--enable-logging=stderr", "--dump-dom")
    requests = _requests(json.loads(net_log.read_text(encoding="utf-8")))
    console = [line for line in opened.stderr.splitlines() if "CONSOLE" in line]
    copy = work / "probed.html"
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace(POLICY, "").replace("</head>", PROBE + "</head>"), encoding="utf-8")
    title = _chromium(work, copy, "--dump-dom").stdout.partition("<title>PROBE")[2].split("|")
    images = {alt: width for alt, width, _ in json.loads(title[0]) if alt and width}
    return Seen(requests, console, images, int(title[1]))


def picture(page: Path, work: Path, *, height: int) -> Path:
    image = work / "page.png"
    _chromium(work, page, f"--window-size=1220,{height}", f"--screenshot={image}")
    return image


def _chromium(work: Path, page: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    quiet = ["--disable-background-networking", "--no-first-run", "--disable-gpu", "--hide-scrollbars"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND"]  # what Chromium asks for by itself finds nothing either
    root = ["--no-sandbox", f"--user-data-dir={work / 'profile'}", "--window-size=1220,4000"]
    command = [CHROMIUM, "--headless", *quiet, *offline, *root, *flags, page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def _requests(log: dict) -> list[str]:
    """Of the page alone: Chromium's own requests have no origin."""
    names = {number: name for name, number in log["constants"]["logEventTypes"].items()}
    started = [event["params"] for event in log["events"] if names[event["type"]] == "URL_REQUEST_START_JOB"]
    return [one["url"] for one in started if one.get("initiator", "not an origin") != "not an origin"]
