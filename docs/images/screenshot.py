"""Make docs/images/report.png of a run's report: its first sections, without scrollbars, cropped where the last of them ends.

    python docs/images/screenshot.py [runs/latest/report.html] [--until "Accuracy against size and latency"] [--out report.png]

Needs Chromium (``apt-get install chromium``, or its path in CHROMIUM). The same page, fonts and Chromium give the same picture.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTH = 1200
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"),
    *("--no-first-run", "--hide-scrollbars", "--force-device-scale-factor=1"),
)
# The page has no scripts of its own; this one only tells how high it is.
MEASURE = "<script>document.title = document.querySelector('main').getBoundingClientRect().height</script>"


def cut(page: str, *, until: str) -> str:
    """The page up to the end of the section with that heading."""
    start = page.find(f"<h2>{until}")
    if start < 0:
        headings = ", ".join(re.findall(r"<h2>(.*?)</h2>", page))
        sys.exit(f"error: the report has no section {until!r}; it has {headings}")
    end = page.index("</section>", start) + len("</section>")
    return f"{page[:end]}\n</main>{MEASURE}\n</body>\n</html>\n"


def shoot(browser: str, page: str, out: Path) -> None:
    """Two passes: how high the page is, then a window of exactly that height."""
    with tempfile.TemporaryDirectory(prefix="report-png-") as directory:
        file = Path(directory) / "page.html"
        file.write_text(page, encoding="utf-8")
        start = [browser, *FLAGS, f"--user-data-dir={directory}/profile"]
        dumped = run([*start, f"--window-size={WIDTH},900", "--dump-dom", file.as_uri()])
        height = round(float(re.findall(r"<title>([\d.]+)</title>", dumped)[0]))
        run([*start, f"--window-size={WIDTH},{height}", f"--screenshot={out.resolve()}", file.as_uri()])


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        sys.exit(f"error: {command[0]} failed with code {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", nargs="?", type=Path, default=Path("runs/latest/report.html"))
    parser.add_argument("--until", default="Accuracy against size and latency", help="the last section to show")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("report.png"))
    arguments = parser.parse_args()
    found = (os.environ.get("CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    browser = next(filter(None, found), None)
    if browser is None:
        sys.exit("error: there is no Chromium; apt-get install chromium, or give its path in CHROMIUM")
    if not arguments.report.is_file():
        sys.exit(f"error: there is no {arguments.report}; horovod-runs report latest makes one")
    shoot(browser, cut(arguments.report.read_text(encoding="utf-8"), until=arguments.until), arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
