"""How many times a second does the page redraw a canvas of 256 positions?

Headless Chromium, its processor throttled to a quarter (Chromium's own throttle), shows the page of
a real server. For some seconds every frame reads a step as it comes over the wire and draws it: a
third of the tokens change, all certainties do. The browser's performance API times each redraw: to
read the step and to draw it (`script`), and to the end of layout (`redraw`). A frame counts once it
is shown.

Bound: at least 30 frames a second.

    python bench/page.py [--seconds 5] [--throttle 4] [--width 256] [--save]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from common import finish, record

PORT = 8943
PATIENCE = 120.0  # seconds for the server to load
FLAGS = "headless no-sandbox disable-gpu disable-quic no-first-run window-size=1440,900".split()
PAGE = f"http://127.0.0.1:{PORT}/"
DRAW = """
const [seconds, width, done] = arguments;
(async () => {
  const {Canvas} = await import("/page/settle.js");
  const {Run} = await import("/page/run.js");
  const run = new Run("chat", {}, "");
  const words = [" the", " answer", " is", " of", "ing", " settles", ",", " noise", ".", " token"];
  words.forEach((word, id) => run.words.set(id, word));
  const draw = (n) => Math.floor(Math.random() * n);
  let draft = Array.from({length: width}, () => draw(words.length));
  const step = () => {
    draft = draft.map((id) => draw(3) ? id : draw(words.length));
    return JSON.stringify({
      row: 0, canvas: 0, step: 0, draft, kinds: "a".repeat(width),
      accepted: draft.map(() => draw(2)), certainty: draft.map(() => draw(1001)),
      entropy: draft.map(() => draw(3000)),
    });
  };
  const steps = Array.from({length: 64}, step);
  const canvas = new Canvas();
  const open = document.createElement("div");
  open.className = "open";
  open.append(canvas.element);
  document.querySelector(".turns").replaceChildren(open);
  let frames = 0;
  const started = performance.now();
  const frame = () => {
    performance.mark("a");
    canvas.draw(run.tokens(JSON.parse(steps[frames % steps.length]), "act"));
    performance.mark("b");
    open.getBoundingClientRect();
    performance.measure("script", "a", "b");
    performance.measure("redraw", "a");
    frames += 1;
    const passed = performance.now() - started;
    if (passed < 1000 * seconds) return requestAnimationFrame(frame);
    const times = (name) => performance.getEntriesByName(name).map((each) => each.duration)
      .sort((x, y) => x - y);
    const at = (found, share) => found[Math.floor(share * (found.length - 1))];
    done({
      frames, seconds: passed / 1000, tokens: open.querySelectorAll(".settling > span").length,
      script_ms: at(times("script"), 0.5), redraw_ms: at(times("redraw"), 0.5),
      redraw_95_ms: at(times("redraw"), 0.95),
    });
  };
  requestAnimationFrame(frame);
})().catch((error) => done({error: String(error)}));
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--throttle", type=float, default=4.0)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--save", action="store_true", help="to bench/results/")
    options = parser.parse_args()
    with served(), chromium() as driver:
        driver.get(PAGE)
        wait(lambda: driver.execute_script("return document.documentElement.dataset.ready"))
        driver.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": options.throttle})
        driver.set_script_timeout(60 + 2 * options.seconds)
        driver.execute_async_script(DRAW, 1.0, options.width)  # warms up
        driver.execute_script("performance.clearMeasures()")
        driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        before = busy_seconds(driver)
        told = driver.execute_async_script(DRAW, options.seconds, options.width)
        busy = busy_seconds(driver) - before
        version = driver.capabilities["browserVersion"]
    if "error" in told:
        sys.exit(told["error"])
    assert told["tokens"] == options.width
    facts = {
        "width": options.width,
        "throttle": options.throttle,
        "chromium": version,
        "frames_per_second": round(told["frames"] / told["seconds"], 1),
        **{name: round(told[name], 2) for name in ("script_ms", "redraw_ms", "redraw_95_ms")},
        "main_ms": round(1000 * busy / told["frames"], 2),
        "frames": told["frames"],
    }
    finish(record("page", **facts), save=options.save)


def busy_seconds(driver: Any) -> float:
    """How long the page's main thread has worked, as its processor counts."""
    told = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return float(next(each["value"] for each in told if each["name"] == "TaskDuration"))


@contextmanager
def served() -> Iterator[None]:
    """A server of the bundled model."""
    command = [sys.executable, "-m", "mlx_diffgemma.serve", "--port", str(PORT), "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait(lambda: urllib.request.urlopen(f"{PAGE}health", timeout=5).status == 200)
        yield
    finally:
        process.terminate()
        process.wait()


def wait(holds: Any) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with suppress(OSError):
            if holds():
                return
        time.sleep(0.1)
    raise SystemExit("the server or its page is not ready")


@contextmanager
def chromium() -> Iterator[Any]:
    """Headless Chromium."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        raise SystemExit("chromium and chromedriver are needed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for flag in (*FLAGS, f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        opened = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield opened
        finally:
            opened.quit()


if __name__ == "__main__":
    main()
