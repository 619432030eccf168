"""The command `lamamba demo`: serves the page until Ctrl-C."""

import os
import signal
import socket
import tempfile
from contextlib import suppress
from types import FrameType

from lamamba.config import DemoConfig
from lamamba.demo.previews import Models
from lamamba.errors import ConfigError, reading
from lamamba.terminal.output import say

_MAX_CONNECTIONS = 512  # a browser keeps up to six


def serve(config: DemoConfig) -> None:
    """Load the checkpoints and serve the page. It does not return: Ctrl-C or SIGTERM end the process.

    Raises:
        LamambaError: a checkpoint or the device is at fault, the address is taken, or Gradio is not installed.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    what = f"{config.host}:{config.port} cannot be listened at"
    with reading(what, "choose another --port or --host", ConfigError):
        listening = socket.create_server((config.host, config.port), family=family)
    with listening:
        with tempfile.TemporaryDirectory(prefix="lamamba-demo-") as folder:
            # Gradio reads these at import. It creates a folder there for a feature that the page does not use.
            os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder)
            with reading("the page needs Gradio", "run pip install 'lamamba[demo]'", ConfigError):
                import uvicorn

                from lamamba.demo.gate import is_loopback
                from lamamba.demo.page import make_app
            models = Models(config.checkpoints, config.device)
            host, port = listening.getsockname()[:2]
            app = make_app(models, config.limits, config.at_once, local=is_loopback(host), hosts=config.allowed_hosts)
        shown = f"[{host}]" if ":" in host else host
        say(f"http://{shown}:{port} shows {', '.join(models.names)}; Ctrl-C ends it")

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                _end(sig)

        Server(uvicorn.Config(app, log_level="warning", limit_concurrency=_MAX_CONNECTIONS)).run(sockets=[listening])


def _end(number: int) -> None:
    """End the process at a signal, at once.

    A thread that computes images cannot be stopped before its step is done, and Python would wait for it. Nothing has
    to be finished: no file is open, and uploads are in memory.
    """
    name = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    with suppress(OSError):
        os.write(2, f"lamamba: {name}\n".encode())
    os._exit(128 + number)
