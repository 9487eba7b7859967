"""A small server that speaks the Hugging Face hub's API, for tests with the real client: it remembers every request.

What it answers, to the letter of the headers, is what the hub answers: the listing of a gated repository is public, its
files are not; a missing and a private repository look alike; large files are redirected to another address.
"""

import gzip
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

TOKEN = "hf_good"
C4 = ("allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2", "en/c4-train.00000-of-01024.json.gz")
LARGE = (".safetensors", ".bin", ".gguf", ".onnx", ".gz", ".parquet", ".model")


@dataclass
class Repo:
    """Files by commit; ``main`` is the newest commit."""

    access: Literal["public", "gated", "private"] = "public"
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """The server; a context manager that serves while it is open.

    Attributes:
        requests: (method, path, value of the Range header) of every request.
        statuses: path ending -> statuses that the next requests get.
        cuts: path ending -> bytes after which the connection of the next requests breaks.
        stall: path ending -> bytes after which the server says nothing more until it is closed.
        after: path ending -> what happens once, after such a request was answered.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.store = f"http://localhost:{self.server_port}"  # another host to the client, as the hub's store is
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str, str]] = []
        self.statuses: dict[str, list[int]] = {}
        self.cuts: dict[str, list[int]] = {}
        self.stall: dict[str, int] = {}
        self.after: dict[str, Callable[[], object]] = {}
        self.stalled, self._closing = threading.Event(), threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        self.shutdown()
        self.server_close()

    def push(self, name: str, files: dict[str, bytes], *, kind="models", access="public", commit="") -> str:
        """A new commit on main; returns its hash."""
        commit = commit or hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repo = self.repos.setdefault((kind, name), Repo(access))
        repo.commits[commit] = files
        repo.refs["main"] = commit
        return commit

    def paths(self, ending: str, method: str = "GET") -> list[str]:
        """Paths of the requests of this method whose path ends so."""
        return [path for verb, path, _ in self.requests if verb == method and path.endswith(ending)]

    def fetched(self) -> set[str]:
        """Names of the files whose contents were requested."""
        parts = [path.strip("/").split("/") for path in self.paths("")]
        small = {"/".join(p[p.index("resolve") + 2 :]) for p in parts if "resolve" in p}
        return {name for name in small if not name.endswith(LARGE)} | {
            "/".join(p[2:]) for p in parts if p[0] == "blobs"
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()
        for ending in [ending for ending in self.server.after if self.path.endswith(ending)]:
            self.server.after.pop(ending)()

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range", "")))
        for ending, statuses in self.server.statuses.items():
            if path.endswith(ending) and statuses:
                return self.reply(statuses.pop(0))
        parts = path.strip("/").split("/")
        if parts == [""]:
            return self.reply(200, b"the hub")
        if parts[0] == "blobs":
            return self.content(path, self.blob(parts[1]))
        kind = "datasets" if "datasets" in parts[:2] else "models"
        parts = [part for part in parts[:2] if part not in ("api", "models", "datasets")] + parts[2:]
        repo, rest = self.server.repos.get((kind, "/".join(parts[:2]))), parts[2:]
        files = rest[:1] == ["resolve"]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            return self.reply(401, error=("", "Invalid credentials in Authorization header"))
        if repo is None or (repo.access == "private" and not token):
            return self.reply(404 if token else 401, error=("RepoNotFound", "Repository not found"))
        if repo.access == "gated" and files and not token:
            return self.reply(401, error=("GatedRepo", "Access to this repository is restricted"))
        revision = rest[1] if rest else "main"
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.reply(404, error=("RevisionNotFound", f"Invalid rev id: {revision}"))
        contents = repo.commits[commit]
        if not files:
            return self.listing("/".join(parts[:2]), commit, contents, tree=rest[:1] == ["tree"])
        name = "/".join(rest[2:])
        if name not in contents:
            return self.reply(404, error=("EntryNotFound", "Entry not found"), headers={"X-Repo-Commit": commit})
        data = contents[name]
        if not name.endswith(LARGE):
            return self.content(path, data, {"X-Repo-Commit": commit, "ETag": f'"{_digest(data)}"'})
        linked = {"X-Linked-ETag": f'"{_digest(data)}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": commit}
        return self.reply(302, headers={**linked, "Location": f"{self.server.store}/blobs/{_digest(data)}/{name}"})

    def blob(self, digest: str) -> bytes:
        commits = [files for repo in self.server.repos.values() for files in repo.commits.values()]
        return next(data for files in commits for data in files.values() if _digest(data) == digest)

    def listing(self, name: str, commit: str, contents: dict[str, bytes], *, tree: bool):
        rows = [
            {"type": "file", "path": path, "size": len(data), "oid": _digest(data)[:40]}
            | ({"lfs": {"oid": _digest(data), "size": len(data), "pointerSize": 130}} if path.endswith(LARGE) else {})
            for path, data in contents.items()
        ]
        siblings = [{"rfilename": path} for path in contents]
        data = rows if tree else {"_id": "0", "id": name, "sha": commit, "siblings": siblings, "tags": []}
        self.reply(200, json.dumps(data).encode(), headers={"Content-Type": "application/json"})

    def content(self, path: str, data: bytes, headers: dict[str, str] | None = None):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"Accept-Ranges": "bytes", **(headers or {})}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        stop = len(data)
        if self.command == "GET":
            for ending, cuts in self.server.cuts.items():
                stop = cuts.pop(0) if path.endswith(ending) and cuts else stop
            stall = next((size for ending, size in self.server.stall.items() if path.endswith(ending)), None)
            stop = stop if stall is None else stall
        self.reply(206 if start else 200, data[start:], headers=headers, send=data[start:stop])
        if self.command == "GET" and stop < len(data):
            if stall is not None:
                self.wfile.flush()
                self.server.stalled.set()
                self.server._closing.wait()
            self.close_connection = True

    def reply(self, status: int, body: bytes = b"", *, headers=None, error=None, send: bytes | None = None):
        """Answer; ``send`` is what is sent of ``body``."""
        code, message = error or ("", "")
        named = {"X-Error-Code": code, "X-Error-Message": message, "Content-Length": str(len(body))}
        self.send_response(status)
        for key, value in {**named, **(headers or {})}.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if send is None else send)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def c4_shard(documents):
    """The file of C4 that holds these."""
    return gzip.compress("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in documents).encode())


def one_line(error):
    """What was raised, as a user reads it."""
    assert "\n" not in str(error.value)
    return str(error.value)
