"""The command `lamamba demo`: the page, served until Ctrl-C."""

import logging
import os
import socket

from lamamba.config import DemoConfig
from lamamba.demo.painting import Models
from lamamba.errors import ConfigError
from lamamba.output import say


def serve(config: DemoConfig) -> None:
    """Load the checkpoints and serve the page until the process is interrupted.

    Raises:
        LamambaError: a checkpoint or the device is at fault, the address is taken, or Gradio is not installed.
    """
    with _listen(config.host, config.port) as listening:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
        try:
            import uvicorn

            from lamamba.demo.gate import is_loopback
            from lamamba.demo.page import make_app
        except ModuleNotFoundError as error:
            raise ConfigError(f"the page needs Gradio ({error}): run pip install 'lamamba[demo]'") from error
        models = Models(config.checkpoints, config.device)
        host, port = listening.getsockname()[:2]
        app = make_app(models, config.limits, config.at_once, local=is_loopback(host), hosts=config.allowed_hosts)
        shown = f"[{host}]" if ":" in host else host
        say(f"http://{shown}:{port} shows {', '.join(models.names)}; Ctrl-C ends it")

        options = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
