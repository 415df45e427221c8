"""A stand-in of the Hugging Face Hub on this machine: repositories of models, private or not, in memory.

It speaks what huggingface_hub 0.36 asks of the hub to create, upload, list and download: https://huggingface.co/docs/hub/api
and, for large files, https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_tests"
READER = "hf_that_only_reads"
LARGE = (".safetensors",)  # what the hub stores by LFS


@dataclass
class Commit:
    id: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)  # newest first

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        before = self.branches.get(branch, [])
        known = [commit.id for commits in self.branches.values() for commit in commits]
        new = Commit(hashlib.sha1(f"{len(known)} {known}".encode()).hexdigest(), title, files)
        self.branches[branch] = [new, *before]
        return new

    def at(self, revision: str) -> Commit | None:
        commits = {commit.id: commit for each in self.branches.values() for commit in each}
        return self.branches[revision][0] if revision in self.branches else commits.get(revision)


class Hub(ThreadingHTTPServer):
    """The server; `repositories`, `requests` (method and path of each) and `refuse` are for tests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of LFS
        self.requests: list[str] = []
        self.refuse: dict[str, tuple[int, str]] = {}  # regular expression of method and path → status, message

    def uploads(self) -> int:
        return sum(request.startswith("PUT ") for request in self.requests)


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        path = urlsplit(self.path).path
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {path}"
        self.server.requests.append(asked)
        for pattern, (status, message) in self.server.refuse.items():
            if re.match(pattern, asked):
                self.answer(status, {"error": message})
                return
        for pattern, handle in ROUTES:
            if match := re.fullmatch(pattern, asked):
                handle(self, data, *map(unquote, match.groups()))
                return
        self.answer(404, {"error": f"no such endpoint: {asked}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, status: int, content: Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def may_write(self) -> bool:
        if self.token == TOKEN:
            return True
        self.answer(
            *((403, {"error": "no write access"}) if self.token == READER else (401, {"error": "Invalid token"}))
        )
        return False

    def repository(self, name: str) -> Repository | None:
        """Return a repository that the sender may see; else answer as the hub does."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and self.token not in (TOKEN, READER)):
            self.answer(401 if not self.token else 404, {"error": "Not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def commit_at(self, name: str, revision: str) -> Commit | None:
        found = self.repository(name)
        commit = found.at(revision) if found else None
        if found and commit is None:
            self.answer(404, {"error": "Invalid rev"}, X_Error_Code="RevisionNotFound")
        return commit


def whoami(self: Handler, data: bytes) -> None:
    known = self.token in (TOKEN, READER)
    self.answer(200 if known else 401, {"name": "me", "orgs": []} if known else {"error": "Invalid user token."})


def create(self: Handler, data: bytes) -> None:
    if not self.may_write():
        return
    asked = json.loads(data)
    name = f"{asked['organization']}/{asked['name']}"
    is_new = name not in self.server.repositories
    if is_new:
        self.server.repositories[name] = Repository(asked["private"])
        self.server.repositories[name].commit("main", "initial commit", {".gitattributes": b"*.safetensors lfs\n"})
    self.answer(200 if is_new else 409, {"url": f"{self.server.url}/{name}", "error": "" if is_new else "exists"})


def tags_of(commit: Commit) -> list[str]:
    """Return the tags of the model card, which the hub gives to the repository."""
    _, _, rest = commit.files.get("README.md", b"").decode().partition("---\n")
    return (yaml.safe_load(rest.partition("---\n")[0]) or {}).get("tags", [])


def info(self: Handler, data: bytes, name: str, revision: str = "main") -> None:
    if commit := self.commit_at(name, revision):
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        private = self.server.repositories[name].private
        self.answer(
            200, {"id": name, "sha": commit.id, "private": private, "siblings": siblings, "tags": tags_of(commit)}
        )


def commits(self: Handler, data: bytes, name: str, revision: str) -> None:
    if self.commit_at(name, revision):
        found = self.server.repositories[name].branches[revision]
        date = "2026-11-28T00:00:00.000Z"
        rows = [{"id": c.id, "title": c.title, "message": "", "date": date, "authors": []} for c in found]
        self.answer(200, rows)


def branch(self: Handler, data: bytes, name: str, new: str) -> None:
    start = json.loads(data).get("startingPoint", "main")
    if self.may_write() and (commit := self.commit_at(name, start)):
        branches = self.server.repositories[name].branches
        is_new = new not in branches
        if is_new:
            branches[new] = [commit]
        self.answer(200 if is_new else 409, {"error": "" if is_new else "Reference already exists"})


def oid_of(path: str, content: bytes) -> str:
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def preupload(self: Handler, data: bytes, name: str, revision: str) -> None:
    if self.may_write() and (commit := self.commit_at(name, revision)):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": oid_of(file["path"], commit.files[file["path"]]) if file["path"] in commit.files else None,
            }
            for file in json.loads(data)["files"]
        ]
        self.answer(200, {"files": files})


def lfs_batch(self: Handler, data: bytes, name: str) -> None:
    if self.may_write():
        objects = json.loads(data)["objects"]
        for each in objects:
            if each["oid"] not in self.server.objects:
                each["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects})


def lfs_upload(self: Handler, data: bytes, oid: str) -> None:
    assert hashlib.sha256(data).hexdigest() == oid
    self.server.objects[oid] = data
    self.answer(200, {})


def commit(self: Handler, data: bytes, name: str, revision: str) -> None:
    if not self.may_write() or not (before := self.commit_at(name, revision)):
        return
    lines = [json.loads(line) for line in data.splitlines()]
    files = dict(before.files)
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        else:
            assert line["key"] == "lfsFile"
            files[value["path"]] = self.server.objects[value["oid"]]
    new = self.server.repositories[name].commit(revision, lines[0]["value"]["summary"], files)
    self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{new.id}", "commitOid": new.id})


def tree(self: Handler, data: bytes, name: str, revision: str, folder: str = "") -> None:
    if commit := self.commit_at(name, revision):
        files = [path for path in sorted(commit.files) if path.startswith(f"{folder}/" if folder else "")]
        if folder and not files:
            self.answer(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
            return
        rows = [{"type": "file", "path": p, "size": len(commit.files[p]), "oid": "0" * 40} for p in files]
        self.answer(200, rows)


def resolve(self: Handler, data: bytes, name: str, revision: str, path: str) -> None:
    if commit := self.commit_at(name, revision):
        if path not in commit.files:
            self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit.id)
            return
        content = commit.files[path]
        self.answer(200, content, X_Repo_Commit=commit.id, ETag=f'"{oid_of(path, content)}"')


REPO = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, Any]] = [
    (r"GET /api/whoami-v2", whoami),
    (r"POST /api/validate-yaml", lambda self, data: self.answer(200, {"warnings": [], "errors": []})),
    (r"POST /api/repos/create", create),
    (rf"GET /api/models/{REPO}", info),
    (rf"GET /api/models/{REPO}/revision/([^/]+)", info),
    (rf"GET /api/models/{REPO}/commits/([^/]+)", commits),
    (rf"GET /api/models/{REPO}/tree/([^/]+)", tree),
    (rf"GET /api/models/{REPO}/tree/([^/]+)/(.+)", tree),
    (rf"POST /api/models/{REPO}/branch/([^/]+)", branch),
    (rf"POST /api/models/{REPO}/preupload/([^/]+)", preupload),
    (rf"POST /api/models/{REPO}/commit/([^/]+)", commit),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", lfs_batch),
    (r"PUT /lfs/(\w+)", lfs_upload),
    (rf"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)", resolve),
]
