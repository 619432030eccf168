"""The emoji become folders of pictures on white, from a tarball or a registry; what was stopped goes on."""

import base64
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamamba.cli import main
from lamamba.data import FolderSource, emoji
from lamamba.data.emoji import NOTO, PACKAGE, EmojiCounts, Expected, prepare_emoji
from lamamba.errors import DataError

COUNTS = {"Flags": 1, "Smileys & Emotion": 3}


def picture(grey: int, size: int = 64) -> bytes:
    """A square of a grey in the middle, and around it nothing at all."""
    pixels = np.zeros((size, size, 4), np.uint8)
    pixels[16:48, 16:48] = (grey, grey, grey, 255)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def entry(name: str, category: str, **more: object) -> dict[str, object]:
    return {"category": category, "image": f"{name}.png", "has_img_google": True, **more}


def package() -> dict[str, bytes]:
    """The files of a package of two categories."""
    tones = {"1F3FB": {"image": "1f44b-1f3fb.png", "has_img_google": True}}
    listed = [
        entry("1f600", "Smileys & Emotion"),
        entry("1f44b", "Smileys & Emotion", skin_variations=tones),
        entry("1f1e9", "Flags"),
        entry("1f1ff", "Flags", has_img_google=False),
    ]
    return {
        "package/emoji.json": json.dumps(listed).encode(),
        "package/README.md": b"read me",
        "package/img/google/sheets/64.png": b"a large one",
        **{f"package/img/google/64/{name}.png": picture(value) for name, value in GREYS.items()},
    }


GREYS = {"1f600": 0, "1f44b": 100, "1f44b-1f3fb": 120, "1f1e9": 200}


def write_tarball(path: Path, files: dict[str, bytes]) -> tuple[Path, Expected]:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return path, Expected("1.2.3", f"sha512-{digest}", num_classes=2, num_images=4)


@pytest.fixture
def tarball(tmp_path: Path) -> tuple[Path, Expected]:
    return write_tarball(tmp_path / "package.tgz", package())


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """A registry's folder, and the paths that it is asked for."""
    folder, asked = tmp_path / "registry", []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"http://127.0.0.1:{server.server_port}/")
    (folder / PACKAGE).mkdir(parents=True)
    record = {"dist": {"tarball": f"http://127.0.0.1:{server.server_port}/files/package.tgz"}}
    (folder / PACKAGE / "1.2.3").write_text(json.dumps(record))
    (folder / "files").mkdir()
    yield folder, asked
    server.shutdown()
    server.server_close()


def test_a_folder_source_reads_them_on_white(tmp_path: Path, tarball: tuple[Path, Expected]) -> None:
    counts = prepare_emoji(tmp_path / "out", source=tarball[0], expected=tarball[1])
    assert counts == EmojiCounts(2, 4, 0, COUNTS)
    source = FolderSource(tmp_path / "out", image_size=64)
    assert source.class_names == ("Flags", "Smileys & Emotion")
    shown = {Path(path).stem: source.load(index)[0] for index, path in enumerate(source.paths)}
    assert {name: int(image[32, 32, 0]) for name, image in shown.items()} == GREYS
    assert all((image[:16] == 255).all() for image in shown.values())
    with Image.open(tmp_path / "out" / "Flags" / "1f1e9.png") as image:
        assert image.mode == "RGB", "whoever reads it otherwise sees the same"


def test_what_was_stopped_goes_on(
    tmp_path: Path, tarball: tuple[Path, Expected], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write_bytes = Path.write_bytes

    def stop_at_third(path: Path, content: bytes) -> int:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_emoji(tmp_path / "out", source=tarball[0], expected=tarball[1])
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".incomplete-Smileys & Emotion", "Flags"]
    counts = prepare_emoji(tmp_path / "out", source=tarball[0], expected=tarball[1])
    assert counts == EmojiCounts(2, 3, 1, COUNTS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Flags", "Smileys & Emotion"]


def test_it_is_fetched_once_and_checked(
    tmp_path: Path, tarball: tuple[Path, Expected], registry: tuple[Path, list[str]]
) -> None:
    folder, asked = registry
    (folder / "files" / "package.tgz").write_bytes(b"not this one")
    with pytest.raises(DataError, match=r"is not the tarball of .* 1\.2\.3, whose integrity is sha512-"):
        prepare_emoji(tmp_path / "out", expected=tarball[1])
    (folder / "files" / "package.tgz").write_bytes(tarball[0].read_bytes())
    assert prepare_emoji(tmp_path / "out", expected=tarball[1]) == EmojiCounts(2, 4, 0, COUNTS)
    assert asked == [f"/{PACKAGE}/1.2.3", "/files/package.tgz"] * 2
    assert prepare_emoji(tmp_path / "out", expected=tarball[1]) == EmojiCounts(2, 0, 4, COUNTS)
    assert len(asked) == 4, "nothing is fetched where all is there"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Flags", "Smileys & Emotion"]


def test_without_a_registry_it_says_how_else(tmp_path: Path, registry: tuple[Path, list[str]]) -> None:
    with pytest.raises(
        DataError, match=r"could not be downloaded .*npm pack .*@9\.9\.9' elsewhere and give source \(--source\)"
    ):
        prepare_emoji(tmp_path / "out", expected=replace(NOTO, version="9.9.9"))


def test_other_tarballs_and_folders_are_refused(tmp_path: Path, tarball: tuple[Path, Expected]) -> None:
    path, expected = tarball
    out = tmp_path / "out"
    with pytest.raises(
        DataError, match=r"is not the tarball of emoji-datasource-google 16.*: download it with 'npm pack"
    ):
        prepare_emoji(out, source=path)
    for source in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=rf"{source} cannot be read \("):
            prepare_emoji(out, source=source, expected=expected)
    prepare_emoji(out, source=path, expected=expected)
    (out / "Flags" / "1f1e9.png").unlink()
    with pytest.raises(DataError, match="Flags has 0 files, not 1: delete"):
        prepare_emoji(out, source=path, expected=expected)
    (out / "mine").mkdir()
    with pytest.raises(DataError, match="also holds 'mine', which is not in the tar"):
        prepare_emoji(out, source=path, expected=expected)


def test_the_command_says_how_many_of_each(
    tmp_path: Path, tarball: tuple[Path, Expected], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(emoji.prepare_emoji, "__kwdefaults__", {"source": None, "expected": tarball[1]})
    main(["prepare", "emoji", "--out", str(tmp_path / "out"), "--source", str(tarball[0])])
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'out'}: 2 classes, 4 images extracted",
        "Flags 1, Smileys & Emotion 3",
    ]


def test_the_published_package() -> None:
    assert (NOTO.version, NOTO.num_classes, NOTO.num_images) == ("16.0.0", 10, 3786)
    assert len(base64.b64decode(NOTO.integrity.removeprefix("sha512-"))) == 64
