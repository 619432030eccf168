"""The page in a browser: what a visitor does, and that nothing is asked of anyone else.

It makes the pictures of docs/demo.md: `python -m pytest -n 0 tests/demo/test_page.py --screenshots docs/demo`.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image

import lamamba
from lamamba.checkpoints.checkpoint import CheckpointInfo, write_weights
from lamamba.config import SampleConfig
from lamamba.model import LaMambaDiff
from lamamba.sampling.generate import sample_grid

pytest.importorskip("gradio", reason="needs Gradio: pip install 'lamamba[demo]'")
pytest.importorskip("selenium", reason="needs Selenium: pip install 'lamamba[dev]'")

from selenium import webdriver
from selenium.common.exceptions import SessionNotCreatedException, StaleElementReferenceException, TimeoutException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class Visitor:
    """A browser at the page."""

    def __init__(self, url: str, downloads: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (
            "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking",
            "--enable-unsafe-swiftshader", "--hide-scrollbars", "--window-size=1320,1000",
            "--proxy-server=127.0.0.1:9",  # no proxy answers there; 127.0.0.1 itself needs none
        ):  # fmt: skip
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.url = url
        self.asked: list[str] = []
        self.open()

    def open(self) -> None:
        self.browser.get(self.url)
        self.wait(lambda: self.seen("button.run"))

    def wait(self, condition: Callable[[], Any], seconds: float = 60) -> Any:
        # Gradio draws anew what it shows: what was found a moment ago may be gone.
        waiting = WebDriverWait(self.browser, seconds, 0.1, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda _: condition())

    def seen(self, selector: str) -> list[Any]:
        return [found for found in self.browser.find_elements(By.CSS_SELECTOR, selector) if found.is_displayed()]

    def texts(self, selector: str) -> list[str]:
        """Of what is seen, read at once: the page may replace it meanwhile."""
        script = """return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility())
            .map(e => e.innerText.trim())"""
        return list(self.browser.execute_script(script, selector))

    def tab(self, name: str) -> None:
        self.wait(lambda: [tab for tab in self.seen("button[role=tab]") if tab.text == name])[0].click()
        time.sleep(0.3)

    def fill(self, selector: str, value: str) -> None:
        field = self.browser.find_element(By.CSS_SELECTOR, selector)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(value, Keys.TAB)

    def value(self, selector: str) -> str:
        return str(self.browser.find_element(By.CSS_SELECTOR, selector).get_property("value"))

    def choose(self, field: str, option: str) -> None:
        self.browser.find_element(By.CSS_SELECTOR, f"{field} input").click()
        self.wait(lambda: [shown for shown in self.seen("[role=option]") if shown.text.endswith(option)])[0].click()

    def run(self) -> None:
        self.press("button.run")

    def finish(self) -> list[str]:
        """Run what the open tab does; return the addresses of its images."""
        # A small model is done between two looks at the page: so the page itself notes that it began.
        self.browser.execute_script(
            """
            window.began = false;
            new MutationObserver((_, observer) => {
                const shown = [...document.querySelectorAll(".status")].filter(e => e.checkVisibility());
                if (shown.some(e => e.innerText.includes("Done in"))) return;
                window.began = true;
                observer.disconnect();
            }).observe(document.body, {childList: true, subtree: true, characterData: true});
            """
        )
        self.run()
        self.wait(lambda: self.browser.execute_script("return window.began"))
        self.wait(lambda: "Done in" in self.status())
        return self.pictures()

    def press(self, selector: str) -> None:
        def pressed() -> bool:
            self.seen(selector)[0].click()
            return True

        self.wait(pressed)

    def cancel(self) -> None:
        """Press the button, and once more as a person would: on a busy machine a click was seen to have no effect."""
        self.press("button.cancel")
        with suppress(TimeoutException):
            self.wait(lambda: self.status() == "Cancelled.", 10)
            return
        self.press("button.cancel")
        self.wait(lambda: self.status() == "Cancelled.", 10)

    def pictures(self) -> list[str]:
        script = (
            "return [...document.querySelectorAll('.pictures img')].filter(e => e.checkVisibility()).map(e => e.src)"
        )
        return list(self.browser.execute_script(script))

    def status(self) -> str:
        return next(iter(self.texts(".status")), "")

    def message(self) -> str:
        """Read the message that is shown, and close it."""
        toast = self.wait(lambda: self.seen("[data-testid=toast-body]"))[0]
        text = str(toast.text)
        self.browser.execute_script("arguments[0].querySelector('button.toast-close').click()", toast)
        self.wait(lambda: not self.seen("[data-testid=toast-body]"))
        return text

    def photograph(self, path: Path, height: int = 860) -> None:
        self.browser.set_window_size(1320, height + 143)
        self.browser.execute_script("window.scrollTo(0, 0)")
        time.sleep(0.5)
        picture = Image.open(io.BytesIO(self.browser.get_screenshot_as_png())).convert("RGB")
        picture.save(path, optimize=True)
        if path.stat().st_size > 150_000:
            picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)

    def addresses(self) -> set[str]:
        """What was asked of the network, without the bytes that came with the page."""
        for entry in self.browser.get_log("performance"):
            sent = json.loads(entry["message"])["message"]
            if sent["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                self.asked.append(sent["params"].get("request", sent["params"])["url"])
        return {address for address in self.asked if not address.startswith(("data:", "blob:"))}


@contextmanager
def serving(*checkpoints: str) -> Iterator[tuple[str, int]]:
    """Run the command; yield its address and process id."""
    # Who starts tests in the background has Ctrl-C ignored, by what they start too.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{program}; from lamamba.cli import main; main()", "demo", *checkpoints]
    process = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line + process.stdout.read()
        yield line.split()[0], process.pid
        process.send_signal(2)
        assert process.wait(10) == 130
        said = process.stdout.read()
        assert said.endswith("lamamba: interrupted\n"), said[-4000:]
        # Gradio may complain of visitors that leave; what passes through this package is an error of ours.
        assert str(Path(lamamba.__file__).parent) not in said, said[-4000:]
    finally:
        process.kill()
        process.wait()


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rests(pid: int) -> bool:
    """Whether a process computes nothing for a second."""
    before = processor_seconds(pid)
    time.sleep(1)
    return processor_seconds(pid) - before < 0.3


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    network = LaMambaDiff(in_channels=3, sample_size=16, num_classes=2, embed_dim=8, num_heads=2, depths=(1, 1, 1, 1))
    write_weights(tmp_path / "secret" / "tiny", network, CheckpointInfo(class_names=("cat", "dog"), objective="flow"))
    return tmp_path / "secret" / "tiny"


def test_ctrl_c_ends_it_while_images_are_made_and_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/dev/null/uploads")
    with ExitStack() as until_ended, serving("nano") as (url, _):  # which looks at what was said
        until_ended.enter_context(urlopen(f"{url}/gradio_api/heartbeat/visitor"))
        with pytest.raises(HTTPError, match="403"):  # another website that has its name point here
            urlopen(Request(f"{url}/config", headers={"Host": "evil.example"}))
        config = json.load(urlopen(f"{url}/config"))
        fields = {component["id"]: component["props"] for component in config["components"]}
        large = {"Images": 16, "Height": 128, "Width": 128, "Side of the grid": 128}
        streams = []
        for visitor, button in enumerate(["Generate", "Measure", "Generate", "Generate"]):  # two of which wait
            pressed = next(key for key, props in fields.items() if props.get("value") == button)
            event = next(event for event in config["dependencies"] if [pressed, "click"] in event["targets"])
            data = [large.get(fields[key].get("label"), fields[key].get("value")) for key in event["inputs"]]
            body = {"data": data, "fn_index": event["id"], "session_hash": f"visitor{visitor}"}
            request = Request(
                f"{url}/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            urlopen(request).close()
            address = f"{url}/gradio_api/queue/data?session_hash=visitor{visitor}"
            streams.append(until_ended.enter_context(urlopen(address)))
        for stream in streams[:2]:
            assert any(b"process_generating" in line for line in stream)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs a browser: apt-get install chromium chromium-driver")
@pytest.mark.slow
def test_a_visit(tiny: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    shots = Path(request.config.getoption("--screenshots") or tmp_path)
    downloads = tmp_path / "downloads"
    with serving("nano", str(tiny)) as (url, pid):
        try:
            visitor = Visitor(url, downloads)
        except SessionNotCreatedException as error:
            pytest.skip(f"Chromium does not start here: {error.msg}")
        try:
            visit(visitor, pid, shots, downloads)
            assert all(address.startswith(url) for address in visitor.addresses())
            assert len(visitor.addresses()) > 20
            severe = [entry for entry in visitor.browser.get_log("browser") if entry["level"] == "SEVERE"]
            assert not severe
        finally:
            visitor.browser.quit()


def visit(visitor: Visitor, pid: int, shots: Path, downloads: Path) -> None:
    # Images appear as they are denoised; what is saved is what `lamamba sample` writes.
    visitor.fill("#steps input[type=number]", "8")
    visitor.fill("#images input[type=number]", "4")
    visitor.run()
    visitor.wait(lambda: "%" in visitor.status())
    early = visitor.pictures()
    visitor.photograph(shots / "preview.png")
    visitor.wait(lambda: "Done in" in visitor.status())
    pictures = visitor.pictures()
    assert len(early) == len(pictures) == 4
    assert not set(early) & set(pictures)
    assert visitor.texts(".pictures figcaption span")[:2] == ["T-shirt/top · seed 0", "Trouser · seed 1"]
    visitor.photograph(shots / "generate.png")
    visitor.seen(".pictures a")[1].click()
    saved = downloads / "lamamba-01.png"
    visitor.wait(saved.exists)
    config = SampleConfig(
        checkpoint="nano", labels="trouser", num_per_label=1, steps=8, seed=1, device="cpu",
        out=downloads / "grid.png", images_out=downloads / "images",
    )  # fmt: skip
    sample_grid(config)
    with Image.open(saved) as own, Image.open(downloads / "images" / "000000.png") as wanted:
        # A batch adds up in another order than a single image: levels may differ by rounding.
        assert np.abs(np.asarray(own).astype(int) - np.asarray(wanted)).max() <= 2
        assert json.loads(own.info["lamamba"]).items() >= json.loads(wanted.info["lamamba"]).items()
    visitor.seen(".save-all a")[0].click()
    visitor.wait((downloads / "lamamba.zip").exists)

    # Bad input is a message, and the page goes on.
    visitor.fill("#seed input", "-1")
    visitor.run()
    assert "seed is -1: it must be a whole number from 0 to 18,446,744,073,709,551,612" in visitor.message()
    visitor.fill("#seed input", "0")
    visitor.tab("Compare guidance")
    visitor.fill("#scales input, #scales textarea", "<b>1</b>")
    visitor.run()
    assert "scales are '<b>1</b>': give numbers separated by commas" in visitor.message()
    visitor.fill("#scales input, #scales textarea", "1, 2, 4, 7")
    visitor.tab("Generate")

    # Another visitor, in a tab of its own, gets the same images while this one's are made; cancelling ends the work.
    visitor.fill("#images input[type=number]", "16")
    visitor.fill("#steps input[type=number]", "300")
    visitor.run()
    visitor.wait(lambda: "%" in visitor.status())
    first = visitor.browser.current_window_handle
    visitor.browser.switch_to.new_window("tab")
    visitor.open()
    visitor.fill("#steps input[type=number]", "8")
    visitor.fill("#images input[type=number]", "4")
    assert visitor.finish() == pictures
    visitor.addresses()
    visitor.browser.close()
    visitor.browser.switch_to.window(first)
    assert "%" in visitor.status()
    visitor.wait(lambda: not rests(pid), 20)  # it has to share the machine's cores
    visitor.cancel()
    visitor.wait(lambda: rests(pid), 20)
    assert visitor.status() == "Cancelled."

    visitor.fill("#steps input[type=number]", "8")
    visitor.tab("Compare guidance")
    assert len(visitor.finish()) == 4
    visitor.photograph(shots / "guidance.png")
    visitor.tab("Interpolate")
    visitor.fill("#between input[type=number]", "4")
    assert len(visitor.finish()) == 4
    visitor.photograph(shots / "interpolate.png")

    visitor.tab("Inpaint")
    visitor.run()
    assert "there is no image: upload one, or take the last one made" in visitor.message()
    visitor.seen("#take")[0].click()
    visitor.wait(lambda: visitor.seen("#editor canvas"))
    time.sleep(1)  # the editor begins to take strokes
    draw = ActionChains(visitor.browser).move_to_element_with_offset(visitor.seen("#editor canvas")[0], 40, -60)
    draw.click_and_hold()
    for _ in range(5):
        draw.move_by_offset(0, 25)
    draw.release().perform()
    time.sleep(0.5)
    assert len(visitor.finish()) == 1
    visitor.photograph(shots / "inpaint.png")

    # The network: paths follow the chosen grid, and a click on a field chooses its pixel.
    visitor.tab("The network")
    visitor.fill("#rows input[type=number]", "5")
    visitor.wait(lambda: len(visitor.browser.find_elements(By.CSS_SELECTOR, "#windows [data-group]")) == 2 * 5 * 16)
    visitor.fill("#rows input[type=number]", "16")
    visitor.browser.find_element(By.CSS_SELECTOR, "#measure").click()
    visitor.wait(lambda: "Done in" in visitor.status())
    assert len(visitor.seen(".field img")) == 3
    visitor.photograph(shots / "network.png", 1250)
    field = visitor.seen("#scan img")[0]
    before, side = field.get_attribute("src"), field.size["width"]
    visitor.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
    # Two pixels on is within a cell, of five.
    ActionChains(visitor.browser).move_to_element_with_offset(field, side // 4 + 2, -side // 4 + 2).click().perform()
    visitor.wait(lambda: visitor.value("#row input") == "16" and visitor.value("#column input") == "48")
    visitor.wait(lambda: visitor.seen("#scan img")[0].get_attribute("src") != before)
    visitor.wait(lambda: "Done in" in visitor.status())
    visitor.fill("#side input", "128")
    visitor.browser.find_element(By.CSS_SELECTOR, "#measure").click()
    visitor.wait(lambda: "%" in visitor.status())
    visitor.cancel()
    visitor.wait(lambda: rests(pid), 20)
    assert visitor.status() == "Cancelled."

    # Another model brings labels, a sampler and a size of its own.
    visitor.tab("Images")
    visitor.tab("Generate")
    visitor.choose("#model", "tiny")
    visitor.wait(
        lambda: "unipc" in visitor.browser.find_element(By.CSS_SELECTOR, "#sampler input").get_property("value")
    )
    visitor.fill("#images input[type=number]", "2")
    visitor.fill("#steps input[type=number]", "2")
    assert len(visitor.finish()) == 2
    assert visitor.texts(".pictures figcaption span") == ["cat · seed 0", "dog · seed 1"]
    assert "secret" not in visitor.browser.page_source
