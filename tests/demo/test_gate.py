"""Requests are refused by who sends them, where to, and how large they are; the page itself is not needed for that."""

import asyncio
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs Gradio: pip install 'lamamba[demo]'")

from starlette.requests import Request
from starlette.responses import JSONResponse

from lamamba.demo import gate as gate_module
from lamamba.demo.gate import Gate, is_loopback
from lamamba.demo.uploads import Uploads

JOIN = "/gradio_api/queue/join"


async def page(scope: Any, receive: Any, send: Any) -> None:
    request = Request(scope, receive)
    await JSONResponse({"length": len(await request.body())})(scope, receive, send)


def ask(
    gate: Gate,
    path: str = "/",
    *,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    pairs: list[tuple[str, str]] | None = None,
    chunks: tuple[bytes, ...] = (b"",),
) -> tuple[int, str]:
    """Send a request, without a Host or a length unless they are given; return the answer's status and body."""
    given = [*(headers or {}).items(), *(pairs or [])]
    scope = {
        "type": "http", "method": method, "path": path, "query_string": b"", "scheme": "http",
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in given],
    }  # fmt: skip
    left = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    left[-1]["more_body"] = False
    sent: list[Any] = []

    async def receive() -> Any:
        return left.pop(0) if left else await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(gate(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]).decode()


def make_gate(**options: Any) -> Gate:
    return Gate(page, Uploads(), **{"local": True, **options})


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:7860", "localhost:7860", "LocalHost", "localhost.", "localhost.:7860", "[::1]:7860", "[::1]",
        "127.0.0.2", "[::ffff:127.0.0.1]:80", "localhost:",
    ],
)  # fmt: skip
def test_this_machine_is_local_by_any_name(host: str) -> None:
    assert ask(make_gate(), headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.2:7860",
        "a.localhost", "0.0.0.0:7860", "[::]", "localhost..", "2130706433", "demo.example.org",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/gradio_api/queue/data", "/gradio_api/heartbeat/a", JOIN])
def test_another_name_for_this_machine_is_refused(host: str, path: str) -> None:
    method = "POST" if path == JOIN else "GET"
    status, said = ask(make_gate(), path, method=method, headers={"Host": host})
    assert status == 403
    assert "does not go by the name" in said


@pytest.mark.parametrize("host", ["", "a@localhost", "localhost:port", "localhost/a", "[::1", "localhost:7860:1"])
def test_a_host_that_is_none_is_refused(host: str) -> None:
    assert ask(make_gate(), headers={"Host": host})[0] == 400


def test_exactly_one_host_is_needed() -> None:
    assert ask(make_gate())[0] == 400
    assert ask(make_gate(), pairs=[("Host", "localhost"), ("Host", "evil.example")])[0] == 400


def test_names_can_be_allowed() -> None:
    allowed = make_gate(hosts=["Demo.Example.org"])
    for host in ("demo.example.org", "DEMO.example.org.", "demo.example.org:8443", "localhost:7860"):
        assert ask(allowed, headers={"Host": host})[0] == 200
    assert ask(allowed, headers={"Host": "evil.example"})[0] == 403
    assert ask(make_gate(local=False), headers={"Host": "evil.example"})[0] == 200  # for all to see
    assert ask(make_gate(local=False, hosts=["demo.example.org"]), headers={"Host": "evil.example"})[0] == 403


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:7860", "http://localhost:7860", 200),
        ("LOCALHOST:7860", "http://localhost:7860", 200),
        ("[::1]:7860", "http://[::1]:7860", 200),
        ("localhost", "http://localhost:80", 200),
        ("demo.example.org", "https://demo.example.org", 200),  # behind a server that has the certificate
        ("localhost:7860", "http://localhost:8000", 403),  # another program of this machine
        ("localhost:7860", "http://localhost", 403),
        ("localhost:7860", "http://127.0.0.1:7860", 403),
        ("localhost:7860", "http://evil.example", 403),
        ("localhost:7860", "http://localhost:7860.evil.example", 403),
        ("localhost:7860", "http://evil.example:7860", 403),
        ("localhost:7860", "null", 403),
        ("localhost:7860", "", 403),
        ("localhost:7860", "file://", 403),
        ("localhost:7860", "chrome-extension://localhost:7860", 403),
        ("localhost:7860", "http://localhost:7860, http://evil.example", 403),
        ("localhost:7860", "http://localhost:7860/a", 403),
        ("localhost:7860", "http://a@localhost:7860", 403),
    ],
)
@pytest.mark.parametrize("path", ["/gradio_api/queue/data", "/gradio_api/heartbeat/a", JOIN, "/gradio_api/upload"])
def test_requests_come_from_the_page_itself(host: str, origin: str, status: int, path: str) -> None:
    method = "GET" if path.endswith(("data", "/a")) else "POST"
    headers = {"Host": host, "Origin": origin, "Content-Type": "multipart/form-data; boundary=a"}
    chunks = (b"--a--\r\n" if path.endswith("upload") else b"{}",)
    asked = make_gate(hosts=["demo.example.org"])
    assert ask(asked, path, method=method, headers=headers, chunks=chunks)[0] == status


@pytest.mark.parametrize(
    ("path", "site", "mode", "status"),
    [
        ("/", "none", "navigate", 200),
        ("/", "cross-site", "navigate", 200),  # a link from elsewhere
        ("/", "cross-site", "no-cors", 403),
        ("/config", "cross-site", "navigate", 403),
        ("/gradio_api/queue/data", "same-site", "no-cors", 403),  # another program of this machine
        ("/gradio_api/queue/data", "same-origin", "cors", 200),
        ("/gradio_api/queue/data", "other", "cors", 403),
    ],
)
def test_what_a_browser_says_of_the_sender_counts(path: str, site: str, mode: str, status: int) -> None:
    headers = {"Host": "localhost", "Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": "document"}
    assert ask(make_gate(), path, headers=headers)[0] == status
    if path == "/" and site == "cross-site":
        assert ask(make_gate(), path, headers={**headers, "Sec-Fetch-Dest": "iframe"})[0] == 403


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", JOIN, 405), ("POST", "/", 405), ("DELETE", "/", 405), ("OPTIONS", JOIN, 405), ("GET", "/other", 404),
        ("GET", "//config", 404), ("GET", "/config/", 404), ("GET", "/config\n", 404), ("GET", "/assets/a b", 404),
        ("GET", "/gradio_api/heartbeat/" + "a" * 65, 404), ("GET", "/assets/a.b-c_d.js", 200), ("GET", "/config", 200),
    ],
)  # fmt: skip
def test_only_what_the_page_asks_for_is_answered(method: str, path: str, status: int) -> None:
    assert ask(make_gate(), path, method=method, headers={"Host": "localhost"})[0] == status


def test_a_websocket_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(make_gate()({"type": "websocket", "path": "/", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"session_hash": "abc"}', 200), (b"{}", 200), (b'{"session_hash": null}', 200),
        (b'{"session_hash": "' + b"a" * 65 + b'"}', 400), (b'{"session_hash": 1}', 400), (b'{"session_hash": ""}', 400),
        (b'{"session_hash": "\xc3\xa4"}', 400), (b"", 400), (b"[]", 400), (b"[" * 60_000, 400), (b"\xff", 400),
        (b" " * 65_537, 413),
    ],
)  # fmt: skip
def test_a_request_is_small_and_of_a_session_with_a_short_name(body: bytes, status: int) -> None:
    headers = {"Host": "localhost"}  # and no Content-Length: what arrives is counted
    chunks = tuple(body[start : start + 1000] for start in range(0, max(1, len(body)), 1000))
    got, said = ask(make_gate(), JOIN, method="POST", headers=headers, chunks=chunks)
    assert got == status, said
    if status == 200:
        assert said == f'{{"length":{len(body)}}}'


def form(*files: bytes) -> bytes:
    parts = [b'--a\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + file for file in files]
    return b"\r\n".join(parts) + b"\r\n--a--\r\n"


UPLOAD = {"path": "/gradio_api/upload", "method": "POST"}
FORM = {"Host": "localhost", "Content-Type": "multipart/form-data; boundary=a"}


def test_an_upload_is_kept_under_a_name_that_says_nothing() -> None:
    gate = make_gate()
    status, said = ask(gate, **UPLOAD, headers=FORM, chunks=(form(b"image", b"drawing"),))
    assert status == 200
    names = said.strip('[]"').split('","')
    assert [gate.uploads[name] for name in names] == [b"image", b"drawing"]
    assert all(name.startswith("/dev/null/uploads/") for name in names)


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (form(b"a" * (20 << 20)), FORM["Content-Type"], 200),
        (form(b"a" * (21 << 20)), FORM["Content-Type"], 413),
        (form(*[b"a"] * 5), FORM["Content-Type"], 400),
        (form(b"a"), "multipart/form-data", 400),
        (b"no form", FORM["Content-Type"], 400),
        (b"{}", "application/json", 415),
    ],
)
def test_an_upload_is_a_form_of_few_files(body: bytes, kind: str, status: int) -> None:
    gate = make_gate()
    got, said = ask(gate, **UPLOAD, headers={**FORM, "Content-Type": kind}, chunks=(body[:9], body[9:]))
    assert got == status, said
    assert len(gate.uploads) == (status == 200)


def test_old_uploads_go_without_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    gate = make_gate()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "call_later", lambda wait, act: waits.append(wait) or act)
        gate.uploads.add(b"image")
        gate._drop_old()
        assert gate._timer is not None
        monkeypatch.setattr("lamamba.demo.uploads.MAX_AGE_S", -1.0)
        gate._timer()  # type: ignore[operator]

    asyncio.run(run())
    assert waits == [60]
    assert len(gate.uploads) == 0
    assert gate._timer is None


def test_what_is_on_its_way_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "MAX_BYTES", 1000)
    gate = make_gate()
    assert ask(gate, **UPLOAD, headers=FORM, chunks=(form(b"a" * 2000),))[0] == 503
    assert ask(gate, **UPLOAD, headers=FORM, chunks=(form(b"a"),))[0] == 200  # it is not counted for ever


def test_a_request_does_not_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "_MAX_BODY_S", 0.01)
    gate = make_gate()
    scope = {"type": "http", "method": "POST", "path": JOIN, "query_string": b"", "headers": [(b"host", b"localhost")]}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(gate(scope, lambda: asyncio.sleep(3600), send))
    assert sent[0]["status"] == 408


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("10.0.0.1", False)],
)
def test_only_a_loopback_address_is_local(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected
