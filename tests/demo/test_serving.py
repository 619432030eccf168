"""What the server says no to, whatever a browser would send."""

import io
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lamamba.cli import main
from lamamba.config import DemoLimits
from lamamba.demo.painting import Models
from lamamba.errors import ConfigError

pytest.importorskip("gradio", reason="needs Gradio: pip install 'lamamba[demo]'")

import gradio
from starlette.testclient import TestClient

from lamamba.demo.page import Page, make_app, split_drawing
from lamamba.demo.serving import _keep_in


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(["nano"], "cpu")


@pytest.fixture(scope="module")
def client(models: Models) -> Iterator[TestClient]:
    with TestClient(_keep_in(make_app(models, DemoLimits(max_images=2, max_steps=3), at_once=1))) as client:
        yield client


def call(client: TestClient, button: str, **changes: Any) -> dict[str, Any]:
    """Press a button with what its fields begin with, but for the changes by label; return the last message."""
    config = client.get("/config").json()
    components = {component["id"]: component["props"] for component in config["components"]}
    pressed = next(key for key, props in components.items() if props.get("value") == button)
    event = next(event for event in config["dependencies"] if [pressed, "click"] in [list(t) for t in event["targets"]])
    data = [changes.get(components[field].get("label"), components[field].get("value")) for field in event["inputs"]]
    body = {"data": data, "fn_index": event["id"], "session_hash": "visitor"}
    client.post("/gradio_api/queue/join", json=body).raise_for_status()
    last: dict[str, Any] = {}
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "visitor"}) as messages:
        for line in messages.iter_lines():
            last = json.loads(line.removeprefix("data:")) if line.startswith("data:") else last
            if last.get("msg") == "process_completed":
                break
    return last


def test_a_request_is_answered(client: TestClient) -> None:
    answer = call(client, "Generate", Steps=2, Images=1)
    assert answer["success"], answer


@pytest.mark.parametrize(
    ("button", "changes", "said"),
    [
        ("Generate", {"Images": 3}, ""),
        ("Generate", {"Steps": 4}, ""),
        ("Generate", {"Height": 2048, "Width": 2048}, "this page makes at most 1,048,576"),
        ("Generate", {"Height": 33}, "image size 33 is not an even number"),
        ("Generate", {"Labels": ["cot"]}, "cot"),
        ("Generate", {"Model": "/etc"}, "/etc"),
        ("Compare", {"Scales": "1, 2, 3"}, "number of scales is 3: give 1 to 2"),
        ("Compare", {"Scales": "1, <b>"}, "scales are '1, &lt;b&gt;'"),
        ("Interpolate", {"Images in all": 3}, ""),
        ("Inpaint", {"Image and mask": None}, "there is no image"),
        ("Measure", {"Side of the grid": 256}, "this page makes at most 65,536"),
        ("Measure", {"Row": 64}, "row is 64: give 0 to 63"),
    ],
)
def test_limits_are_held_on_the_server(client: TestClient, button: str, changes: dict[str, Any], said: str) -> None:
    answer = call(client, button, **{"Steps": 2, "Images": 1, **changes})
    assert not answer["success"]
    assert answer["output"]["error"]
    assert said in answer["output"]["error"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["SECRET", "/etc/passwd", "http://example.org/image.png"])
@pytest.mark.parametrize(("button", "field"), [("Inpaint", "Image and mask"), ("Generate", "Seed")])
def test_nothing_is_opened_that_was_not_uploaded(
    client: TestClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    stream: bool,
    button: str,
    field: str,
) -> None:
    opened: list[Any] = []
    really_open = Image.open

    def open_image(path: Any) -> Any:
        picture = really_open(path)
        opened.append(path)
        return picture

    monkeypatch.setattr("PIL.Image.open", open_image)
    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", lambda *_, **__: opened.append(path))
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    path = path.replace("SECRET", str(tmp_path / "secret.png"))
    file = {"path": path, "is_stream": stream, "meta": {"_type": "gradio.FileData"}}
    value = {"background": file, "layers": [file]} if button == "Inpaint" else file
    answer = call(client, button, **{"Steps": 2, "Images": 1, field: value})
    assert not answer["success"]
    assert not opened


def test_what_was_uploaded_is_painted_on(client: TestClient) -> None:
    layer = Image.new("RGBA", (40, 30))
    layer.paste((219, 39, 119, 255), (0, 0, 20, 30))
    files = []
    for picture in (Image.new("RGB", (40, 30), "white"), layer):
        content = io.BytesIO()
        picture.save(content, format="PNG")
        path = client.post("/gradio_api/upload", files={"files": ("a.png", content.getvalue())}).json()[0]
        files.append({"path": path, "meta": {"_type": "gradio.FileData"}})
    drawn = {"background": files[0], "layers": files[1:]}
    answer = call(client, "Inpaint", **{"Steps": 2, "Image and mask": drawn})
    assert answer["success"], answer
    assert call(client, "Inpaint", **{"Steps": 2, "Image and mask": {**drawn, "layers": []}})["output"]["error"] == (
        "nothing is masked: draw over what is to be painted anew"
    )


def test_a_file_that_is_no_image_is_a_message(client: TestClient) -> None:
    path = client.post("/gradio_api/upload", files={"files": ("a.png", b"no image")}).json()[0]
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    answer = call(client, "Inpaint", **{"Steps": 2, "Image and mask": {"background": file, "layers": []}})
    assert "the file is no image" in answer["output"]["error"]


@pytest.mark.parametrize("path", ["SECRET", "/etc/passwd", "../../../../etc/passwd"])
def test_no_file_of_the_machine_is_served(client: TestClient, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_text("secret")
    path = path.replace("SECRET", str(tmp_path / "secret"))
    assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_a_browser_is_told_to_ask_nobody_else(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert "fonts.googleapis.com" not in answer.text


def test_another_model_sets_the_fields_that_depend_on_it(models: Models) -> None:
    page = Page(models, DemoLimits(max_pixels=2 * 32 * 32))
    changed = dict(zip(page.values, page._on_model("nano", list(page.values)), strict=True))
    assert changed["num_images"]["value"] == 2  # no more than the limit of pixels allows
    assert changed["labels"]["choices"][-1] == "no label"
    with pytest.raises(gradio.Error, match="no model is named"):
        page._on_model("../nano", [])


def test_the_smallest_limits_make_a_page(models: Models) -> None:
    page = Page(models, DemoLimits(max_images=1, max_steps=1, max_pixels=1024))
    assert page.settings["steps"].value == page.values["num_images"]["value"] == 1


def test_a_drawing_is_an_image_and_a_mask() -> None:
    layer = Image.new("RGBA", (8, 6))
    layer.paste((219, 39, 119, 255), (2, 1, 5, 4))
    image, mask = split_drawing({"background": Image.new("RGB", (8, 6)), "layers": [layer]})
    assert image.size == mask.size == (8, 6)
    assert mask.getbbox() == (2, 1, 5, 4)
    assert set(mask.tobytes()) == {0, 255}
    for nothing in (None, {"background": None, "layers": [layer]}):
        with pytest.raises(ConfigError, match="there is no image"):
            split_drawing(nothing)


def test_an_address_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SystemExit):
        main(["demo", "--port", str(other.getsockname()[1])])
    said = capsys.readouterr().err
    assert said.startswith("lamamba: error: 127.0.0.1:")
    assert "choose another --port" in said
    assert said.count("\n") == 1


def test_without_gradio_it_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "lamamba.demo.page")
    with pytest.raises(SystemExit):
        main(["demo", "--port", "0"])
    said = capsys.readouterr().err
    assert "pip install 'lamamba[demo]'" in said
    assert said.count("\n") == 1
