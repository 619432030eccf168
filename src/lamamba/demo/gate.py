"""Lets only the page's own requests through: to known addresses, from the page itself, and of limited size.

Gradio's server can do more than this page needs. Everything that is not listed here is refused before Gradio sees it.
"""

import asyncio
import ipaddress
import json
import re
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse

from lamamba.demo.uploads import MAX_BYTES, MAX_FILE_BYTES, Uploads

_UPLOAD = "/gradio_api/upload"
_ROUTES = {
    "GET": re.compile(
        r"/|/favicon\.ico|/manifest\.json|/theme\.css|/config|/(assets|static)/[\w./-]+"
        r"|/gradio_api/(app_id|queue/data|heartbeat/\w{1,64})"
    ),
    "POST": re.compile(rf"/gradio_api/(queue/join|run/predict|cancel|reset)|{_UPLOAD}"),
}
_MAX_JSON_BYTES = 64 << 10
_MAX_UPLOAD_BYTES = MAX_FILE_BYTES + (64 << 10)  # of a file and the form around it
_MAX_FILES = 4  # per upload; the page sends one at a time
_MAX_BODY_S = 60
_SESSION = re.compile(r"\w{1,64}", re.ASCII)
# With this, browsers contact no other server. Gradio's pages evaluate text as code and start workers from blobs.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
_HEADERS = ((b"content-security-policy", _POLICY), (b"x-content-type-options", b"nosniff"))


class _RefusedError(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Gate:
    """An ASGI application in front of that of the page.

    Args:
        app: the application of the page.
        uploads: keeps uploaded files. Gradio's own endpoint for uploads, which writes to the disk, is never reached.
        local: whether only this machine can connect. If so, the `Host` must be a loopback address or `localhost`;
            otherwise another website could let its own name point here (DNS rebinding) and read the page.
        hosts: other host names of the page. If there are any, the `Host` must be one of them or local.
    """

    def __init__(self, app: Any, uploads: Uploads, *, local: bool, hosts: Collection[str] = ()) -> None:
        self.app, self.uploads = app, uploads
        self.hosts = {host.lower().rstrip(".") for host in hosts}
        self.checks_host = local or bool(hosts)
        self._num_arriving_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # the page uses no websockets
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        try:
            self._check(scope)
            body = await self._read(Request(scope, receive)) if scope["method"] == "POST" else None
            if scope["path"] == _UPLOAD:
                names = [self.uploads.add(file) for file in await _files(Headers(scope=scope), body or b"")]
                if self._timer is None:
                    self._drop_old()
                await JSONResponse(names)(scope, receive, send_with_headers)
                return
            if body is not None:
                _check_session(body)
        except ClientDisconnect:
            return
        except _RefusedError as refused:
            answer = PlainTextResponse(f"{refused}\n", refused.status, {"connection": "close"})
            await answer(scope, receive, send_with_headers)
            return
        await self.app(scope, receive if body is None else _replay(body, receive), send_with_headers)

    def _drop_old(self) -> None:
        """Drop old uploads now, then every minute while there are any, since requests may not come for long."""
        self.uploads.drop_old()
        later = asyncio.get_running_loop().call_later
        self._timer = later(60, self._drop_old) if len(self.uploads) else None

    def _check(self, scope: Any) -> None:
        headers = Headers(scope=scope)
        hosts, origins, site = headers.getlist("host"), headers.getlist("origin"), headers.get("sec-fetch-site")
        host = _host_and_port(f"http://{hosts[0]}") if len(hosts) == 1 else None
        if host is None:
            raise _RefusedError(400, f"the Host header is {', '.join(hosts) or 'missing'}: send the name of this page")
        if self.checks_host and host[0] not in self.hosts and not is_loopback(host[0]):
            raise _RefusedError(
                403, f"this page does not go by the name {host[0]}: start it with --allowed-hosts {host[0]}"
            )
        for origin in origins:
            sender = _host_and_port(origin)
            if sender is None or sender != _host_and_port(f"{origin.partition(':')[0]}://{hosts[0]}"):
                raise _RefusedError(403, f"this page does not take requests from {origin}: open it at its own address")
        opens = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"  # a link to it, or a bookmark
        if site not in (None, "same-origin", "none") and not (opens and headers.get("sec-fetch-dest") == "document"):
            raise _RefusedError(403, "this page does not take requests from other websites: open it at its own address")
        if not any(route.fullmatch(scope["path"]) for route in _ROUTES.values()):
            raise _RefusedError(404, "there is no such address here")
        route = _ROUTES.get(scope["method"])
        if route is None or not route.fullmatch(scope["path"]):
            raise _RefusedError(405, f"this address does not take {scope['method']} requests")

    async def _read(self, request: Request) -> bytes:
        """Read a body within the limits for one request and for all that are being received."""
        most = _MAX_UPLOAD_BYTES if request.scope["path"] == _UPLOAD else _MAX_JSON_BYTES
        body = bytearray()
        try:
            async with asyncio.timeout(_MAX_BODY_S):
                async for chunk in request.stream():
                    self._num_arriving_bytes += len(chunk)
                    body += chunk
                    if len(body) > most:
                        raise _RefusedError(413, f"the request has more than {most:,} bytes: upload a smaller file")
                    if self._num_arriving_bytes > MAX_BYTES:
                        raise _RefusedError(503, "too much is being uploaded at the moment: try again in a minute")
        except TimeoutError:
            raise _RefusedError(408, f"the request took more than {_MAX_BODY_S} seconds to arrive: try again") from None
        finally:
            self._num_arriving_bytes -= len(body)
        return bytes(body)


def _host_and_port(origin: str) -> tuple[str, int] | None:
    """Split an origin such as http://[::1]:7860 into host and port; None if it is not an origin, such as "null"."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return None
    default = {"http": 80, "https": 443}.get(parts.scheme)
    if default is None or not parts.hostname or parts.netloc != origin.partition("://")[2] or "@" in parts.netloc:
        return None
    return parts.hostname.removesuffix("."), default if port is None else port


def is_loopback(host: str) -> bool:
    """Return whether only this machine can connect to a name or address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


async def _files(headers: Headers, body: bytes) -> list[bytes]:
    """Read the files of a form."""

    async def stream() -> Any:
        yield body
        yield b""

    if not headers.get("content-type", "").startswith("multipart/form-data"):
        raise _RefusedError(415, "an upload is a form of files: send multipart/form-data")
    parser = MultiPartParser(headers, stream(), max_files=_MAX_FILES, max_fields=_MAX_FILES)
    parser.spool_max_size = len(body) + 1  # nothing goes to the disk
    try:
        form = await parser.parse()
    except (MultiPartException, LookupError, ValueError) as error:
        raise _RefusedError(
            400, f"the form cannot be read ({getattr(error, 'message', error)}): send files alone"
        ) from error
    files = []
    for value in form.getlist("files"):
        if isinstance(value, UploadFile):
            files.append(await value.read())
    await form.close()
    return files


def _check_session(body: bytes) -> None:
    """Refuse session names that the page would not choose, since Gradio keeps every name while the server runs."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise _RefusedError(400, "the request is no JSON object: open the page in a browser")
    session = content.get("session_hash")
    if session is not None and not (isinstance(session, str) and _SESSION.fullmatch(session)):
        raise _RefusedError(400, "session_hash is not 1 to 64 letters and digits: open the page in a browser")


def _replay(body: bytes, receive: Any) -> Any:
    """Make an ASGI `receive` that returns a body that was read already, then later messages."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive_again() -> Any:
        return next(messages, None) or await receive()

    return receive_again
