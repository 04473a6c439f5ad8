"""The picture of the report page in the documentation, from a real run: curves above, one group with shaded tokens below.

    python scripts/picture_report.py                       trains the demo, writes docs/pictures/report.png
    python scripts/picture_report.py --run OUT_DIR         of a run that is there
    python scripts/picture_report.py --run OUT_DIR --looks FOLDER    also every part in light, dark and on a phone

Needs Chromium with its driver, and the extra `report`.
"""

import argparse
import io
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from benchmarks.browser import open_browser, open_page
from ludic.report.page import write_report
from ludic.storage.jsonl import read_jsonl

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "report.png"
DEMO = ("--demo", "--train-steps", "40", "--eval-every", "10", "--max-staleness", "1", "--record-token-logprobs")
"""Rollouts that are an update old have a gap that can be seen, and all of them have log-probs."""
WIDTH, CURVES_HEIGHT, GROUP_HEIGHT, BAND = 1400, 592, 800, 16
COLOURS = 256
"""Of the picture's palette, so that it is small."""
PARTS = ("curves", "time", "rollouts", "evaluations", "settings")


def train(folder: Path) -> Path:
    """A run of the demo: some minutes on two cores."""
    script = ROOT / "examples" / "gsm8k" / "train_gsm8k.py"
    subprocess.run([sys.executable, str(script), *DEMO, "--out-dir", str(folder)], check=True)
    return folder


def telling_group(run: Path) -> str:
    """The address of the longest group whose completions differ, of those of which some are right and some are wrong."""
    rows: list[Any] = read_jsonl(next(run.glob("*_train_rollouts.jsonl")))
    found = {}
    for place, (_, members) in enumerate(itertools.groupby(rows, key=lambda row: row["group"])):
        group = list(members)
        if len({one["completion"] for one in group}) > 5 and 2 < sum(one["correct"] for one in group) < 6:
            found[sum(one["completion_tokens"] for one in group)] = place
    return f"rollouts?group={found[max(found)]}" if found else "rollouts"


def shot(browser: "Chrome", page: Path, address: str, *, width: int, height: int, theme: str = "light") -> Image.Image:
    """What a window of that size shows; 0 as the height is all of it."""
    phone = {"deviceScaleFactor": 2, "mobile": True} if width < 500 else {"deviceScaleFactor": 1, "mobile": False}
    size = {"width": width, "height": height or 844, **phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    open_page(browser, page, f"#{address}")
    if not height:
        whole = browser.execute_script("return document.documentElement.scrollHeight")
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "height": min(whole, 4000)})
    return Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")


def picture(browser: "Chrome", page: Path, group: str) -> Image.Image:
    """The curves above the group."""
    curves = shot(browser, page, "curves", width=WIDTH, height=CURVES_HEIGHT)
    rollouts = shot(browser, page, group, width=WIDTH, height=GROUP_HEIGHT)
    both = Image.new("RGB", (WIDTH, CURVES_HEIGHT + BAND + GROUP_HEIGHT), "#d5d9de")
    both.paste(curves, (0, 0))
    both.paste(rollouts, (0, CURVES_HEIGHT + BAND))
    return both.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).convert("P")


def looks(browser: "Chrome", page: Path, group: str, folder: Path) -> None:
    """Every part of the page, to be looked at: wide in light and dark, and on a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, width, theme in (("light", WIDTH, "light"), ("dark", WIDTH, "dark"), ("phone", 390, "light")):
        for part in PARTS:
            address = group if part == "rollouts" else part
            shot(browser, page, address, width=width, height=0, theme=theme).save(folder / f"{part}-{name}.png")
    shot(browser, page, f"{group}&shade=gap", width=WIDTH, height=0, theme="dark").save(folder / "gap-dark.png")
    shot(browser, page, f"{group}&shade=gap", width=WIDTH, height=0).save(folder / "gap-light.png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--run", type=Path, metavar="OUT_DIR", help="of a training (default: the demo is trained)")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture (default: %(default)s)")
    parser.add_argument("--looks", type=Path, metavar="FOLDER", help="also each part: light, dark, on a phone")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, open_browser(WIDTH, 1000) as browser:
        run = arguments.run or train(Path(folder) / "demo")
        page, group = Path(folder) / "page.html", telling_group(run)
        write_report([run], page)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        picture(browser, page, group).save(arguments.out, optimize=True)
        sys.stdout.write(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB\n")
        if arguments.looks:
            looks(browser, page, group, arguments.looks)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
