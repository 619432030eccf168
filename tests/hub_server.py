"""A Hugging Face hub of one user, `tester`, in a thread: the few endpoints that sending and fetching a model need."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_of_the_tester"


@dataclass
class Repository:
    """Files of each branch, by path."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


@dataclass
class Hub:
    """What is on the hub, and what nobody knew how to answer."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        method = "GET" if self.command == "HEAD" else self.command
        self.state.requests.append(f"{self.command} {path}")
        for pattern, respond in _ROUTES:
            match = re.fullmatch(pattern, f"{method} {path}")
            if match:
                getattr(self, respond)(*match.groups())
                return
        self.state.unanswered.append(f"{self.command} {path}")
        self.reply(404, {"error": "nothing is here"})

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def reply(self, status: int, content: Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def repository(self, name: str) -> Repository | None:
        """Find a repository, as far as the one who asks may see it; otherwise say that there is none."""
        found = self.state.repositories.get(name)
        if found is None or (found.private and not self.is_tester):
            self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    @property
    def is_tester(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.state.endpoint}/{name}"
        if not self.is_tester:
            self.reply(401, {"error": "Invalid user token."})
        elif wanted["organization"] != "tester":
            self.reply(403, {"error": f"You don't have the rights to create a model under {wanted['organization']}"})
        elif name in self.state.repositories:
            self.reply(409, {"error": "You already created this model repo", "url": url})
        else:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.state.repositories[name] = Repository(private)
            self.reply(200, {"url": url, "name": name, "id": name})

    def branch(self, name: str, branch: str) -> None:
        self.state.repositories[name].branches.setdefault(branch, {})
        self.reply(200, {})

    def validate(self) -> None:
        wrong = "license: unheard-of" in json.loads(self.body)["content"]
        errors = [{"message": '"license" must be one of [mit, other]'}] if wrong else []
        self.reply(400 if wrong else 200, {"errors": errors, "warnings": []})

    def preupload(self, name: str, branch: str) -> None:
        if self.repository(name) is not None:
            files = [
                {
                    "path": file["path"], "shouldIgnore": False, "oid": None,
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                }
                for file in json.loads(self.body)["files"]
            ]  # fmt: skip
            self.reply(200, {"files": files})

    def batch(self, name: str) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.state.endpoint}/large/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        self.reply(200, {"transfer": "basic", "objects": objects})

    def take(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.state.large_files[oid] = self.body
        self.reply(200, {})

    def commit(self, name: str, branch: str) -> None:
        files = self.state.repositories[name].branches[branch]
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.large_files[value["oid"]]
        self.reply(200, {
            "commitUrl": f"{self.state.endpoint}/{name}/commit/{_sha(files)}", "commitOid": _sha(files),
            "success": True, "hookOutput": "",
        })  # fmt: skip

    def info(self, name: str, branch: str | None = None) -> None:
        found = self.repository(name)
        if found is not None:
            files = _files(found, branch or "main")
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
            self.reply(200, {
                "id": name, "modelId": name, "sha": _sha(files), "private": found.private, "siblings": siblings,
                "tags": [], "downloads": 0, "likes": 0,
            })  # fmt: skip

    def tree(self, name: str, branch: str) -> None:
        found = self.repository(name)
        if found is not None:
            self.reply(200, [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in _files(found, branch).items()
            ])  # fmt: skip

    def resolve(self, name: str, branch: str, path: str) -> None:
        found = self.repository(name)
        if found is None:
            return
        files = _files(found, branch)
        if path not in files:
            self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=_sha(files))
            return
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        self.reply(200, files[path], ETag=etag, X_Repo_Commit=_sha(files))


def _files(repository: Repository, branch: str) -> dict[str, bytes]:
    """Find a branch's files, by its name or its commit's."""
    for name, files in repository.branches.items():
        if branch in (name, _sha(files)):
            return files
    return {}


def _sha(files: dict[str, bytes]) -> str:
    digest = hashlib.sha1()
    for path, content in sorted(files.items()):
        digest.update(path.encode() + content)
    return digest.hexdigest()


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"POST /api/repos/create", "create"),
    (rf"POST /api/models/{_NAME}/branch/(.+)", "branch"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", "preupload"),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /large/(\w+)", "take"),
    (rf"POST /api/models/{_NAME}/commit/(.+)", "commit"),
    (rf"GET /api/models/{_NAME}", "info"),
    (rf"GET /api/models/{_NAME}/revision/(.+)", "info"),
    (rf"GET /api/models/{_NAME}/tree/(.+)", "tree"),
    (rf"GET /{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
]
