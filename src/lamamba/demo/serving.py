"""The command `lamamba demo`: the page, served until Ctrl-C."""

import logging
import os
import socket
import tempfile
from typing import Any

from PIL import Image

from lamamba.config import DemoConfig
from lamamba.demo.painting import Models
from lamamba.errors import ConfigError
from lamamba.output import say

# A browser then refuses to ask anyone else, whatever Gradio's pages contain; they make functions of text, and workers.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"


def serve(config: DemoConfig) -> None:
    """Load the checkpoints and serve the page until the process is interrupted.

    What visitors upload is in a folder of the server's own, which goes with it.

    Raises:
        LamambaError: a checkpoint or the device is at fault, the address is taken, or Gradio is not installed.
    """
    listening = _listen(config.host, config.port)
    with listening, tempfile.TemporaryDirectory(prefix="lamamba-demo-") as uploads:
        # Read when Gradio is imported, and at every start.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=uploads)
        try:
            import uvicorn

            from lamamba.demo.page import make_app
        except ModuleNotFoundError as error:
            raise ConfigError(f"the page needs Gradio ({error}): run pip install 'lamamba[demo]'") from error
        Image.MAX_IMAGE_PIXELS = 1 << 25  # of uploads; beyond twice as many they are refused
        models = Models(config.checkpoints, config.device)
        app = make_app(models, config.limits, config.at_once)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"http://{shown}:{port} shows {', '.join(models.names)}; Ctrl-C ends it")
        options = uvicorn.Config(_keep_in(app), log_level="warning", timeout_graceful_shutdown=1)

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                # Pages that are open hold connections, whose ends it would report as errors, with tracebacks.
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
                await super().shutdown(sockets)

        Server(options).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        cause = error.strerror or error
        raise ConfigError(f"{host}:{port} cannot be listened at ({cause}): choose another --port or --host") from error


def _keep_in(app: Any) -> Any:
    """Wrap an ASGI application so that its pages may fetch from it alone."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", _POLICY)]
            await send(message)

        await app(scope, receive, send_with_policy)

    return answer
