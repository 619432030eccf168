"""The page: its fields, its tabs, and what its buttons call. Other files compute and draw what it shows."""

import asyncio
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from typing import Any, get_args

import gradio as gr
import numpy as np
import torch
from gradio_client.utils import is_file_obj_with_meta, traverse
from PIL import Image, ImageOps

from lamamba.config import DemoLimits
from lamamba.demo.figures import MAX_SIDE, PATH_NAMES, draw_paths, draw_windows
from lamamba.demo.gallery import SAVE_LINKS, STYLE, draw_images, png_address
from lamamba.demo.gate import Gate
from lamamba.demo.previews import Models, Preview, Shown, compare_guidance, inpaint, interpolate, sample
from lamamba.demo.receptive_field import NUM_DRAWS, Branches, draw_receptive_field, receptive_fields
from lamamba.demo.settings import (
    DEFAULTS,
    MAX_GUIDANCE,
    Request,
    label_names,
    read_number,
    read_numbers,
    read_request,
    read_whole,
)
from lamamba.demo.uploads import FOLDER, Uploads, read_drawing
from lamamba.errors import ConfigError, LamambaError
from lamamba.model import LaMambaDiff
from lamamba.sampling.generate import ImageSampler
from lamamba.sampling.labels import why_unguided

_TITLE = """
# LaMamba-Diff
Images from noise. Each block of the network combines a scan, which covers the whole image at linear cost, with window
attention, which handles detail ([arXiv 2408.02615](https://arxiv.org/abs/2408.02615)).
"""
_PATHS = """
### The scan
The scan reads the pixels one after another along four paths, which start at the ring. Each path carries a state from
its first pixel to its last. Together, the paths connect every pixel with every other pixel.
"""
_WINDOWS = """
### Attention in windows
Each pixel attends to the pixels of the same color around it. In every other block, the windows are shifted by half.
"""
_FIELD = """
### What a pixel sees
How much each pixel of the noisy image affects the prediction at the pixel framed in red. Colors show the magnitude of
the gradient on a logarithmic scale over four decades; light gray means none. Click on a picture to choose a pixel.
"""
_STYLE = (
    STYLE
    + """
.gradio-container { max-width: 1320px !important; }
.status { font-size: 14px; }
.bar { display: inline-block; width: 240px; height: 8px; margin-right: 10px; border-radius: 4px; background: #8884; }
.bar div { height: 8px; border-radius: 4px; background: #3b82f6; }
.status span.error, .images span.error { display: none; } /* the message says it */
.field img { width: 100%; image-rendering: pixelated; cursor: crosshair; }
"""
)
# Reports a click as fractions of the picture's height and width.
_SELECT_PIXEL = """
element.addEventListener("click", (event) => {
    const image = event.target.closest("img");
    if (!image) return;
    const box = image.getBoundingClientRect();
    const index = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
    trigger("select", {index: index.map((place) => Math.min(1, Math.max(0, place))), value: null});
});
"""
_EDITOR_SIDE = 384
_MAX_SESSIONS = 256  # visitors whose last image and unread answers are kept
_MAX_UNREAD = 8  # previews that wait for a slow reader
_MAX_UNREAD_S = 10.0  # sampling ends when nothing was read for so long
_MAX_UNREAD_MESSAGES = 64  # per visitor, with errors and positions in the queue
_MAX_ERROR = 2000  # characters
_GRID = 16
_NEW_SEED = "() => Math.floor(Math.random() * 4294967296)"
_AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_QUEUED = {"concurrency_id": "network", "show_progress": "minimal", "api_visibility": "private"}


def make_app(
    models: Models, limits: DemoLimits, at_once: int, *, local: bool = False, hosts: Collection[str] = ()
) -> Any:
    """Make the ASGI application of the page.

    At most `at_once` requests run at the same time. `local` and `hosts` are explained at `Gate`.
    """
    from fastapi import FastAPI

    os.environ["GRADIO_TEMP_DIR"] = FOLDER  # nothing can be written there
    page = Page(models, limits)
    blocks = page.blocks.queue(default_concurrency_limit=at_once, max_size=64, api_open=False)
    blocks.state_session_capacity = _MAX_SESSIONS
    _bound_unread_messages(blocks)
    _open_uploads_alone(blocks, page.uploads)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="blue", **fonts).set(block_info_text_color="*neutral_500")
    bare = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    off = ("run_history", "show_error", "enable_monitoring", "ssr_mode", "pwa", "mcp_server")
    options = {**dict.fromkeys(off, False), "footer_links": [], "theme": theme, "css": _STYLE}
    app = gr.mount_gradio_app(bare, blocks, path="/", **options)
    return Gate(app, page.uploads, local=local, hosts=hosts)


def _open_uploads_alone(page: gr.Blocks, uploads: Uploads) -> None:
    """Make Gradio refuse files that were not uploaded, and URLs, in every field."""
    page.has_launched = True  # otherwise, in a mounted application, Gradio opens any path
    preprocess = page.preprocess_data

    async def preprocess_uploads(block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        with _as_messages():
            traverse(inputs, lambda file: uploads[file["path"]], is_file_obj_with_meta)
        return await preprocess(block_fn, inputs, *args, **kwargs)

    page.preprocess_data = preprocess_uploads


def _bound_unread_messages(page: gr.Blocks) -> None:
    """Limit the messages kept for visitors who never read them: Gradio keeps all, for 2,000 visitors."""
    messages, send = page._queue.pending_messages_per_session, page._queue.send_message
    messages.max_size = _MAX_SESSIONS

    def send_and_drop_old(event: Any, message: Any) -> None:
        unread = messages.get(event.session_hash)
        if unread is None:  # dropped, since many other visitors came
            event.alive = False
            return
        while unread.qsize() >= _MAX_UNREAD_MESSAGES:
            unread.get_nowait()
        send(event, message)

    page._queue.send_message = send_and_drop_old


def _wait_for_reader(page: gr.Blocks, session: str | None, most: int) -> None:
    """Wait until a visitor has read all but a few answers, so that images do not pile up in memory.

    Raises:
        ConfigError: the visitor has stopped reading. Unread answers are dropped.
    """
    messages = page._queue.pending_messages_per_session
    before, since = 0, time.monotonic()
    while (unread := messages.get(session)) is not None and (number := unread.qsize()) > most:
        if number < before:  # some were read
            since = time.monotonic()
        elif time.monotonic() - since > _MAX_UNREAD_S:
            messages[session] = asyncio.Queue()
            raise ConfigError(f"nobody has read the answers for {_MAX_UNREAD_S:.0f} seconds: reload the page")
        before = number
        time.sleep(0.02)


def _read_drawings(editor: gr.ImageEditor, uploads: Uploads) -> None:
    """Make an editor decode a drawing to an image and a mask, and refuse one that is too large."""

    def preprocess(payload: Any) -> Any:
        if payload is None or payload.background is None:
            return None
        with _as_messages():
            return read_drawing(uploads[payload.background.path], [uploads[layer.path] for layer in payload.layers])

    # Not a subclass: Gradio writes a file beside the source of classes that derive from its own.
    editor.preprocess = preprocess


class Page:
    """The layout of the page. Visitors share nothing but weights."""

    def __init__(self, models: Models, limits: DemoLimits) -> None:
        self.models, self.limits, self.uploads = models, limits, Uploads()
        self.fields: dict[str, Any] = {}
        self.values = _of_model(models[models.names[0]], limits)
        with gr.Blocks(title="LaMamba-Diff", analytics_enabled=False) as self.blocks:
            with gr.Row(equal_height=True):
                with gr.Column(scale=3):
                    gr.Markdown(_TITLE)
                with gr.Column(scale=2, min_width=300):
                    self.model = self._field(gr.Dropdown, "model", choices=models.names, label="Model", elem_id="model")
            self.last = gr.State(None, time_to_live=3600)  # image, for inpainting
            with gr.Tab("Images"), gr.Row():
                with gr.Column(scale=1, min_width=300), gr.Group():
                    self.settings = self._settings()
                with gr.Column(scale=3):
                    self._generate()
                    self._compare_guidance()
                    self._interpolate()
                    self._inpaint()
            with gr.Tab("The network"):
                self._geometry()
                self._receptive_field()
            changing = [self.fields[name] for name in self.values]
            self.model.change(self._on_model, self.model, changing, **_AT_ONCE)

    def _on_model(self, name: Any) -> list[dict[str, Any]]:
        """Update the fields that depend on the model, in the order of `values`."""
        with _as_messages():
            return [gr.update(**values) for values in _of_model(self.models[name], self.limits).values()]

    def _field(self, kind: Any, name: str, *given: Any, **options: Any) -> Any:
        """Make a field whose value depends on the model if `_of_model` has one for it."""
        self.fields[name] = kind(*given, **options, **self.values.get(name, {}))
        return self.fields[name]

    def _settings(self) -> dict[str, Any]:
        """Make the fields that all tabs use, named as in `read_request`."""
        before, most = set(self.fields), max(2, self.limits.max_steps)  # the two ends of a slider must differ
        info = "Several images use the labels in turn; the other tabs use the first."
        self._field(gr.Dropdown, "labels", multiselect=True, label="Labels", elem_id="labels", info=info)
        self._field(gr.Dropdown, "sampler", label="Sampler", elem_id="sampler")
        self._field(gr.Slider, "steps", 1, most, step=1, label="Steps", elem_id="steps")
        self._field(gr.Slider, "guidance", 0, MAX_GUIDANCE, step=0.1, label="Guidance (1 is none)", elem_id="guidance")
        seed = self._field(gr.Number, "seed", 0, label="Seed", elem_id="seed")
        gr.Button("New seed", size="sm").click(None, None, seed, js=_NEW_SEED)
        with gr.Accordion("Size and more of guidance", open=False, elem_id="more"):
            with gr.Row():
                self._field(gr.Number, "height", label="Height", elem_id="height", min_width=100)
                self._field(gr.Number, "width", label="Width", elem_id="width", min_width=100)
            self._field(gr.Slider, "rescale", 0, 1, 0, step=0.05, label="Rescale", info="Reduces too much contrast.")
            with gr.Row():
                info = "Noise over signal."
                self._field(gr.Number, "interval_low", None, label="Guide from", min_width=100, info=info)
                info = "Empty: everywhere."
                self._field(gr.Number, "interval_high", None, label="Guide up to", min_width=100, info=info)
        return {name: field for name, field in self.fields.items() if name not in before}

    def _generate(self) -> None:
        with gr.Tab("Generate"):
            most = max(2, self.limits.max_images)
            self._field(gr.Slider, "num_images", 1, most, step=1, label="Images", elem_id="images")
            self._button("Generate", ["num_images"], sample, _label_and_seed)

    def _compare_guidance(self) -> None:
        with gr.Tab("Compare guidance"):
            info = "One image at each scale, with the same label and seed."
            self._field(gr.Textbox, "scales", "1, 2, 4, 7", label="Scales", elem_id="scales", info=info)

            def start(model: ImageSampler, request: Request, scales: Any) -> Shown:
                return compare_guidance(model, request, read_numbers("scales", scales), self.limits)

            self._button("Compare", ["scales"], start, lambda _, made: f"guidance {made['guidance']:g}")

    def _interpolate(self) -> None:
        with gr.Tab("Interpolate"):
            gr.Markdown(
                "From the first label and the seed on the left to the label and seed here, on an arc through the noise."
            )
            with gr.Row():
                self._field(gr.Dropdown, "end_label", label="Last label")
                self._field(gr.Number, "end_seed", 1, label="Last seed")
                most = max(3, self.limits.max_images)
                self._field(gr.Slider, "num_between", 2, most, step=1, label="Images in all", elem_id="between")

            def start(model: ImageSampler, request: Request, end_label: Any, end_seed: Any, num_between: Any) -> Shown:
                label = model.labels.find(str(end_label))
                return interpolate(model, request, end_seed, label, num_between, self.limits)

            more = ["end_label", "end_seed", "num_between"]
            self._button("Interpolate", more, start, lambda _, made: f"{made['fraction']:.0%}")

    def _inpaint(self) -> None:
        def start(model: ImageSampler, request: Request, image: Any, strength: Any) -> Shown:
            if image is None:
                raise ConfigError("there is no image: upload one, or take the last one made")
            drawing, mask = image
            return inpaint(model, request, drawing, mask, strength)

        with gr.Tab("Inpaint"):
            gr.Markdown("Draw over the part to repaint with the first label on the left. The rest stays.")
            with gr.Row():
                with gr.Column():
                    side = {"canvas_size": (_EDITOR_SIDE, _EDITOR_SIDE), "height": _EDITOR_SIDE + 60}
                    sources = {"sources": ("upload", "clipboard"), "transforms": (), "layers": False, "buttons": []}
                    brush = gr.Brush(default_size=36, colors=["#db2777"], color_mode="fixed")
                    options = {"label": "Image and mask", "elem_id": "editor", "type": "pil", "brush": brush}
                    image = self._field(gr.ImageEditor, "image", **options, **sources, **side)
                    _read_drawings(image, self.uploads)
                    take = gr.Button("Take the last image made", elem_id="take")
                    take.click(_to_editor, self.last, image, postprocess=False, queue=False, api_visibility="private")
                with gr.Column():
                    info = "Below 1, the old image shows through."
                    self._field(gr.Slider, "strength", 0.05, 1, 1, step=0.05, label="Strength", info=info)
                    self._button("Inpaint", ["image", "strength"], start, _label_and_seed)

    def _geometry(self) -> None:
        with gr.Row():
            rows = gr.Slider(2, MAX_SIDE, _GRID, step=1, label="Rows", elem_id="rows")
            columns = gr.Slider(2, MAX_SIDE, _GRID, step=1, label="Columns", elem_id="columns")
            window_size = self._field(gr.Slider, "window_size", 2, 16, step=2, label="Side of a window")
            scan = self._field(gr.Radio, "scan", list(PATH_NAMES), label="Scan")

        def draw(height: Any, width: Any, window: Any, kind: Any) -> tuple[str, str]:
            with _as_messages():
                return draw_paths(height, width, kind), draw_windows(height, width, window)

        drawn = draw(_GRID, _GRID, window_size.value, scan.value)
        with gr.Row():
            with gr.Column(scale=2, min_width=480):
                gr.Markdown(_PATHS)
                paths = gr.HTML(drawn[0], elem_id="paths")
            with gr.Column(scale=1, min_width=240):
                gr.Markdown(_WINDOWS)
                windows = gr.HTML(drawn[1], elem_id="windows")
        inputs = [rows, columns, window_size, scan]
        changes = [field.change for field in inputs]
        gr.on(changes, draw, inputs, [paths, windows], trigger_mode="always_last", **_AT_ONCE)

    def _receptive_field(self) -> None:
        gr.Markdown(_FIELD)
        with gr.Row():
            side = self._field(gr.Number, "side", label="Side of the grid", elem_id="side")
            row = self._field(gr.Number, "row", label="Row", elem_id="row")
            column = self._field(gr.Number, "column", label="Column", elem_id="column")
            measure = gr.Button("Measure", variant="primary", elem_id="measure")
            cancel = gr.Button("Cancel", elem_classes="cancel", min_width=100)
        status = gr.HTML(elem_classes="status")
        pictures = []
        with gr.Row():
            for name, title in zip(get_args(Branches), ("Scan only", "Attention only", "Both"), strict=True):
                with gr.Column(min_width=220):
                    gr.Markdown(f"**{title}**")
                    pictures.append(gr.HTML(js_on_load=_SELECT_PIXEL, elem_classes="field", elem_id=name))

        def see(values: dict[Any, Any]) -> Iterator[tuple[float, list[Any]]]:
            network = self.models[values[self.model]].network.network
            if not isinstance(network, LaMambaDiff):
                raise ConfigError("this model is a DiT, which has neither branch: choose another model")
            # Gradients keep the activations of every layer: many times the memory of sampling.
            limits = replace(self.limits, max_pixels=max(1, self.limits.max_pixels // 16))
            grid, pixel = (values[side], values[side]), (values[row], values[column])
            for place, branches in enumerate(get_args(Branches)):
                fields = receptive_fields(network, *grid, pixel, branches, limits)
                for number, field in enumerate(fields, start=1):
                    drawn = [gr.skip()] * len(pictures)
                    address = png_address(draw_receptive_field(field, (int(pixel[0]), int(pixel[1]))))
                    drawn[place] = f'<img alt="What the pixel sees: {branches}" src="{address}">'
                    yield (place + number / NUM_DRAWS) / len(pictures), drawn

        def point(event: gr.SelectData, side: Any) -> tuple[int, int]:
            with _as_messages():
                cells = read_whole("side of the grid", side, 1, self.limits.max_pixels)
                if not (isinstance(event.index, list) and len(event.index) == 2):
                    raise ConfigError(f"a click at {event.index!r}: give two numbers")
                row, column = (int(read_number("place of a click", place, 0, 1) * cells) for place in event.index)
            return min(row, cells - 1), min(column, cells - 1)

        run = {"fn": self._stream(see, len(pictures)), "inputs": {self.model, side, row, column}, **_QUEUED}
        started = [measure.click(**run, outputs=[status, *pictures])]
        for picture in pictures:
            pointed = picture.select(point, side, [row, column], **_AT_ONCE)
            started.append(pointed.then(**run, outputs=[status, *pictures]))
        _cancels(cancel, started, status)

    def _button(
        self,
        name: str,
        more: Sequence[str],
        start: Callable[..., Shown],
        caption: Callable[[ImageSampler, dict[str, Any]], str],
    ) -> None:
        """Add a button, a button that cancels it, and the place where images appear.

        Args:
            name: what the button says.
            more: names of the fields that are needed beside the settings.
            start: begins to sample a request; gets the values of the fields in `more` that are no part of it by name.
            caption: describes an image by its settings.
        """
        with gr.Row():
            run = gr.Button(name, variant="primary", elem_classes="run", scale=4)
            cancel = gr.Button("Cancel", elem_classes="cancel", min_width=100)
        status = gr.HTML(elem_classes="status")
        images = gr.HTML(js_on_load=SAVE_LINKS, elem_classes="images")
        fields = {**self.settings, **{other: self.fields[other] for other in more}}

        def show(values: dict[Any, Any]) -> Iterator[tuple[float, list[Any]]]:
            model = self.models[values[self.model]]
            asked = {name: values[field] for name, field in fields.items()}
            own = {name: asked.pop(name) for name in more if name not in DEFAULTS}
            for shown in start(model, read_request(asked, model, self.limits), **own):
                if isinstance(shown, Preview):
                    yield shown.done, [draw_images(shown.images), gr.skip()]
                else:
                    captions = [caption(model, made) for made in shown.settings]
                    yield 1.0, [draw_images(shown.images, captions, shown.settings), shown.images[0]]

        inputs, outputs = {self.model, *fields.values()}, [status, images, self.last]
        _cancels(cancel, [run.click(self._stream(show, 2), inputs, outputs, **_QUEUED)], status)

    def _stream(self, work: Callable[[dict[Any, Any]], Iterator[tuple[float, list[Any]]]], num_outputs: int) -> Any:
        """Make an event's function of work that yields how much is done, and its outputs; the status is shown first."""

        def stream(values: dict[Any, Any], request: gr.Request) -> Iterator[list[Any]]:
            began, unchanged = time.monotonic(), [gr.skip()] * num_outputs
            yield ["", *unchanged]  # clears the message of the previous request
            with _as_messages():
                for done, outputs in work(values):
                    _wait_for_reader(self.blocks, request.session_hash, _MAX_UNREAD)
                    bar = f'<div class="bar"><div style="width:{done:.0%}"></div></div>{done:.0%}'
                    yield [bar, *outputs]
                _wait_for_reader(self.blocks, request.session_hash, 0)
            yield [f"Done in {time.monotonic() - began:.1f} s.", *unchanged]

        return stream


def _cancels(button: gr.Button, started: list[Any], status: gr.HTML) -> None:
    """Make a button cancel running work, and say so."""
    button.click(lambda: "Cancelled.", None, status, cancels=started, **_AT_ONCE)


@contextmanager
def _as_messages() -> Iterator[None]:
    """Show errors as messages on the page."""
    try:
        yield
    except LamambaError as error:
        text = str(error)[:_MAX_ERROR]  # it may repeat long input
        raise gr.Error(escape(text, quote=False), print_exception=False) from error  # it is shown as HTML
    except torch.OutOfMemoryError as error:
        raise gr.Error("memory is full: ask for fewer or smaller images", print_exception=False) from error


def _of_model(model: ImageSampler, limits: DemoLimits) -> dict[str, dict[str, Any]]:
    """Return the initial values of the fields that depend on the model, by name."""
    config = model.network.config
    names, side = label_names(model), int(config.sample_size)
    labels = names[: min(4, model.num_classes)] or names
    default, pixels = model.sampler, side * model.space.factor
    samplers = [default, *(other for other in model.objective.samplers if other != default)]
    number = max(1, min(8, limits.max_images, limits.max_pixels // pixels**2))
    return {
        "model": {"info": _describe(model)},
        "labels": {"choices": names, "value": labels},
        "sampler": {"choices": samplers, "value": default},
        "steps": {"value": min(model.steps, limits.max_steps)},
        "guidance": {"value": model.guidance, "interactive": not why_unguided(config)},
        "height": {"value": pixels},
        "width": {"value": pixels},
        "num_images": {"value": number},
        "end_label": {"choices": names, "value": labels[-1]},
        "num_between": {"value": max(2, number)},
        "scan": {"value": config.get("scan", "continuous")},
        "window_size": {"value": min(16, int(config.get("window_size", 8)))},
        # At twice the training size, windows no longer cover the smallest grid, so attention alone leaves pixels out.
        "side": {"value": 2 * side},
        "row": {"value": side + side // 4},
        "column": {"value": side // 2},
    }


def _describe(model: ImageSampler) -> str:
    size = int(model.network.config.sample_size) * model.space.factor
    parameters = sum(parameter.numel() for parameter in model.network.network.parameters())
    classes = f"{model.num_classes} classes" if model.num_classes else "no labels"
    if own := model.info.distilled:
        classes += f"; {own}"
    elif model.num_classes and (why := why_unguided(model.network.config)):
        classes += f"; guidance is off: {why}"
    return f"{parameters / 1e6:,.1f} million parameters, trained at {size} x {size}, {classes}"


def _label_and_seed(model: ImageSampler, made: dict[str, Any]) -> str:
    return f"{model.labels.name(made['label'])} · seed {made['seed']}"


def _to_editor(image: np.ndarray | None) -> dict[str, Any]:
    """Enlarge a (c, h, w) image to draw on it, and return it as the value of an editor."""
    with _as_messages():
        if image is None:
            raise ConfigError("no image was made yet: generate some, or upload one")
    drawn = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    drawn = ImageOps.scale(drawn, max(1, _EDITOR_SIDE // max(drawn.size)), Image.Resampling.NEAREST)
    return {"background": {"url": png_address(drawn)}, "layers": [], "composite": None}
