"""What the server says no to, whatever a browser would send."""

import asyncio
import io
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from lamamba.cli import main
from lamamba.config import DemoLimits
from lamamba.demo.previews import Models

pytest.importorskip("gradio", reason="needs Gradio: pip install 'lamamba[demo]'")

import gradio
from starlette.testclient import TestClient

from lamamba.demo.page import Page, make_app
from lamamba.demo.serving import _end


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(["nano"], "cpu")


@pytest.fixture(scope="module")
def client(models: Models) -> Iterator[TestClient]:
    with TestClient(make_app(models, DemoLimits(max_images=2, max_steps=3), at_once=1)) as client:
        yield client


def press(client: TestClient, button: str, **changes: Any) -> None:
    """Press a button with what its fields begin with, but for the changes by label."""
    config = client.get("/config").json()
    components = {component["id"]: component["props"] for component in config["components"]}
    pressed = next(key for key, props in components.items() if props.get("value") == button)
    event = next(event for event in config["dependencies"] if [pressed, "click"] in [list(t) for t in event["targets"]])
    data = [changes.get(components[field].get("label"), components[field].get("value")) for field in event["inputs"]]
    body = {"data": data, "fn_index": event["id"], "session_hash": "visitor"}
    client.post("/gradio_api/queue/join", json=body).raise_for_status()


def call(client: TestClient, button: str, **changes: Any) -> dict[str, Any]:
    """Press a button and return the last message."""
    press(client, button, **changes)
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


def upload(client: TestClient, content: bytes) -> dict[str, Any]:
    answer = client.post("/gradio_api/upload", files={"files": ("a.png", content)})
    assert answer.status_code == 200, answer.text
    return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}


def png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


def test_what_was_uploaded_is_painted_on(client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    layer = Image.new("RGBA", (40, 30))
    layer.paste((219, 39, 119, 255), (0, 0, 20, 30))
    # More than the megabyte that forms are usually kept in memory up to.
    noise = Image.frombytes("RGB", (800, 600), random.Random(0).randbytes(3 * 800 * 600))
    background = upload(client, png(noise))
    drawn = {"background": background, "layers": [upload(client, png(layer))]}
    assert str(tmp_path) not in background["path"]
    answer = call(client, "Inpaint", **{"Steps": 2, "Image and mask": drawn})
    assert answer["success"], answer
    assert call(client, "Inpaint", **{"Steps": 2, "Image and mask": {**drawn, "layers": []}})["output"]["error"] == (
        "nothing is masked: draw over the part to repaint"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "num_layers", "said"),
    [
        (b"no image", 1, "the file is no PNG image"),
        (png(Image.new("L", (8, 8))), 12, "the drawing has 12 layers, and the canvas has 1"),
        (png(Image.new("L", (6000, 3000))), 1, "more than 33,554,432 pixels together"),
    ],
)
def test_a_drawing_that_is_none_or_too_large_is_a_message(
    client: TestClient, content: bytes, num_layers: int, said: str
) -> None:
    file = upload(client, content)
    drawn = {"background": file, "composite": file, "layers": [file] * num_layers}
    assert said in call(client, "Inpaint", **{"Steps": 2, "Image and mask": drawn})["output"]["error"]


def test_a_field_that_was_changed_by_the_server_takes_no_files_either(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[Any] = []
    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", lambda *_, **__: fetched.append(1))
    config = client.get("/config").json()
    model = next(item["id"] for item in config["components"] if item["props"].get("label") == "Model")
    change = next(event["id"] for event in config["dependencies"] if [model, "change"] in event["targets"])
    body = {"data": ["nano"], "fn_index": change, "session_hash": "visitor"}
    client.post("/gradio_api/run/predict", json=body).raise_for_status()
    file = {"path": "https://example.org/a.png", "meta": {"_type": "gradio.FileData"}}
    assert "the image is not there" in call(client, "Generate", Labels=file)["output"]["error"]
    # Nor one that is within something that looks like an upload.
    nested = {"path": upload(client, b"a")["path"], "more": file}
    assert not call(client, "Generate", Labels=nested)["success"]
    assert not fetched


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/component_server", "/gradio_api/component_server/", "/openapi.json", "/docs", "/gradio_api/info",
        "/gradio_api/openapi.json", "/monitoring", "/monitoring/summary", "/gradio_api/queue/status", "/robots.txt",
        "/gradio_api/deep_link", "/gradio_api/runs", "/gradio_api/file=/etc/passwd", "/gradio_api/file=SECRET",
        "/gradio_api/file=https://example.org/", "/gradio_api/proxy=https://example.org/",
        "/gradio_api/stream/a", "/gradio_api/call/predict", "/gradio_api/api/predict", "/gradio_api/run/other",
        "/gradio_api/process_recording", "/gradio_api/vibe-code", "/gradio_api/mcp/sse", "/login", "/pwa_icon",
    ],
)  # fmt: skip
def test_nothing_else_of_gradio_is_reached(client: TestClient, tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_text("secret")
    path = path.replace("SECRET", str(tmp_path / "secret"))
    for method in ("GET", "POST", "PUT", "OPTIONS"):
        assert client.request(method, path).status_code in (404, 405)


def test_a_blob_for_the_editor_is_refused(client: TestClient) -> None:
    components = client.get("/config").json()["components"]
    editor = next(item["id"] for item in components if item["type"] == "imageeditor")
    fields = {
        "component_id": editor, "session_hash": "a", "fn_name": "accept_blobs", "id": "a", "type": "layer",
        "index": 200_000_000,
    }  # fmt: skip
    answer = client.post("/gradio_api/component_server", data=fields, files={"file": b"a"})
    assert answer.status_code == 404


def test_the_queue_cannot_be_passed_by(client: TestClient) -> None:
    config = client.get("/config").json()
    queued = next(event["id"] for event in config["dependencies"] if event["queue"] is not False)
    body = {"data": [], "fn_index": queued, "session_hash": "visitor"}
    assert client.post("/gradio_api/run/predict", json=body).status_code == 404


def queue_of(client: TestClient) -> Any:
    gate: Any = client.app
    return next(route.app for route in gate.app.routes if hasattr(route.app, "state_holder")).get_blocks()._queue


@pytest.mark.parametrize("most", [0, 8], ids=["while sampling", "at the end"])
def test_previews_that_nobody_reads_are_dropped(models: Models, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("lamamba.demo.page._MAX_UNREAD", most)
    monkeypatch.setattr("lamamba.demo.page._MAX_UNREAD_S", 0.1)
    with TestClient(make_app(models, DemoLimits(), at_once=1)) as client:
        press(client, "Generate", Steps=2, Images=1)
        deadline, unread = time.monotonic() + 60, queue_of(client).pending_messages_per_session
        while "nobody has read" not in (kept := str(unread["visitor"]._queue)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert "<img" not in kept


def test_messages_that_nobody_reads_are_few(models: Models) -> None:
    with TestClient(make_app(models, DemoLimits(), at_once=1)) as client:
        queue = queue_of(client)
        unread = queue.pending_messages_per_session
        for number in range(300):
            unread[str(number)] = asyncio.Queue()
        assert len(unread) == 256
        event = SimpleNamespace(session_hash="299", alive=True, _id="a")
        for index in range(100):
            queue.send_message(event, SimpleNamespace(index=index))
        assert [message.index for message in unread["299"]._queue] == list(range(36, 100))
        gone = SimpleNamespace(session_hash="0", alive=True, _id="a")
        queue.send_message(gone, SimpleNamespace())
        assert not gone.alive


def test_sessions_are_few(models: Models) -> None:
    with TestClient(make_app(models, DemoLimits(), at_once=1)) as client:
        assert client.get("/").status_code == 200
        gate: Any = client.app
        page = next(route.app for route in gate.app.routes if hasattr(route.app, "state_holder"))
        assert page.state_holder.capacity == 256


@pytest.mark.parametrize("place", [[0.26, 0.76], [1, 1], [0, 0], "no place", [2, 0], [None, 0]])
def test_a_click_chooses_a_pixel(client: TestClient, place: Any) -> None:
    config = client.get("/config").json()
    select = next(event for event in config["dependencies"] if event["targets"][0][1] == "select")
    body = {"data": [64], "fn_index": select["id"], "event_data": {"index": place, "value": None}}
    answer = client.post("/gradio_api/run/predict", json={**body, "session_hash": "a"})
    chosen = {(0.26, 0.76): [16, 48], (1, 1): [63, 63], (0, 0): [0, 0]}
    if tuple(place) in chosen:
        assert answer.json()["data"] == chosen[tuple(place)]
    else:
        assert "click" in answer.json()["error"]


@pytest.mark.parametrize(("number", "said"), [(2, b"lamamba: interrupted\n"), (15, b"lamamba: stopped by SIGTERM\n")])
def test_a_signal_ends_the_process_at_once(
    number: int, said: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    _end(number)
    assert codes == [128 + number]
    assert capfd.readouterr().err.encode() == said


def test_a_browser_is_told_to_ask_nobody_else(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert "fonts.googleapis.com" not in answer.text


def test_another_model_sets_the_fields_that_depend_on_it(models: Models) -> None:
    page = Page(models, DemoLimits(max_pixels=2 * 32 * 32))
    changed = dict(zip(page.values, page._on_model("nano"), strict=True))
    assert changed["num_images"]["value"] == 2  # no more than the limit of pixels allows
    assert changed["labels"]["choices"][-1] == "no label"
    with pytest.raises(gradio.Error, match="no model is named"):
        page._on_model("../nano")


def test_the_smallest_limits_make_a_page(models: Models) -> None:
    page = Page(models, DemoLimits(max_images=1, max_steps=1, max_pixels=1024))
    assert page.settings["steps"].value == page.values["num_images"]["value"] == 1


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
