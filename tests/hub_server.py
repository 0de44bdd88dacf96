# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""A Hub on loopback: the endpoints that `huggingface_hub` calls to push a model and to load it again, in memory."""

import base64
import hashlib
import json
import re
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_REPO, _REVISION = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
# Method, path and the method of `_Handler` that answers, which takes the path's named groups.
_ROUTES = [
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/models/{_REPO}(/revision/{_REVISION})?", "repo_info"),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}(/(?P<folder>.+))?", "list_tree"),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", "preupload"),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", "commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
    ("HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
]


def git_oid(content: bytes) -> str:
    """The name that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repo:
    """Commits, each a dictionary from path to content; the last one is `main`."""

    def __init__(self):
        self.commits: dict[str, dict[str, bytes]] = {}
        self.add_commit({})

    def add_commit(self, files: dict[str, bytes]) -> str:
        listing = [len(self.commits), sorted((path, git_oid(content)) for path, content in files.items())]
        oid = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        self.commits[oid] = files
        return oid

    @property
    def main(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, bytes]:
        """What `main` holds."""
        return self.commits[self.main]


class HubServer(ThreadingHTTPServer):
    """Serves in a thread while its `with` block runs. Anyone reads, the bearer of `token` writes."""

    daemon_threads = True

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        # Names of the endpoints that were called, as in `_ROUTES`.
        self.calls: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        super().__exit__(*exception)


class _HubError(Exception):
    """An answer other than success, with what tells the client which exception to raise."""

    def __init__(self, status: HTTPStatus, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *args):
        """Nothing on stderr."""

    def answer(self):
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            for method, pattern, name in _ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, path)):
                    self.server.calls.append(name)
                    groups = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    return getattr(self, name)(**groups)
            raise _HubError(HTTPStatus.NOT_FOUND, f"This Hub has no endpoint {self.command} {path}")
        except _HubError as error:
            self.send({"error": str(error)}, error.status, **error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, content: bytes | dict | list, status: HTTPStatus = HTTPStatus.OK, **headers: str):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def check_token(self):
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            raise _HubError(HTTPStatus.UNAUTHORIZED, "Invalid credentials in Authorization header")

    def find_repo(self, repo_id: str) -> Repo:
        if repo_id not in self.server.repos:
            raise _HubError(HTTPStatus.NOT_FOUND, "Repository not found", "RepoNotFound")
        return self.server.repos[repo_id]

    def find_commit(self, repo_id: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        repo = self.find_repo(repo_id)
        oid = repo.main if revision in (None, "main") else revision
        if oid not in repo.commits:
            raise _HubError(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repo.commits[oid]

    def create_repo(self):
        self.check_token()
        request = json.loads(self.body)
        repo_id = f"{request['organization']}/{request['name']}"
        status = HTTPStatus.CONFLICT if repo_id in self.server.repos else HTTPStatus.OK
        self.server.repos.setdefault(repo_id, Repo())
        self.send({"url": f"{self.server.url}/{repo_id}"}, status)

    def validate_yaml(self):
        self.send({"errors": [], "warnings": []})

    def repo_info(self, repo_id: str, revision: str | None):
        oid, files = self.find_commit(repo_id, revision)
        self.send({"id": repo_id, "sha": oid, "private": False, "siblings": [{"rfilename": path} for path in files]})

    def list_tree(self, repo_id: str, revision: str, folder: str | None):
        _, files = self.find_commit(repo_id, revision)
        prefix = f"{folder}/" if folder else ""
        found = {path: content for path, content in files.items() if path.startswith(prefix)}
        if folder and not found:
            raise _HubError(HTTPStatus.NOT_FOUND, f"{folder} does not exist on {revision}", "EntryNotFound")
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            for path, content in found.items()
        ]
        self.send(entries)

    def preupload(self, repo_id: str, revision: str):
        """How to upload each file (weights as on the Hub, by LFS), and what the commit holds there already."""
        self.check_token()
        _, files = self.find_commit(repo_id, revision)
        answers = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            oid = self.etag(path, files[path]) if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send({"files": answers})

    def lfs_batch(self, repo_id: str):
        self.check_token()
        self.find_repo(repo_id)
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        self.send({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str):
        """No token here: on the Hub the address itself is signed."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _HubError(HTTPStatus.BAD_REQUEST, f"The content is not that of {oid}")
        self.server.lfs_objects[oid] = self.body
        self.send(b"")

    def commit(self, repo_id: str, revision: str):
        self.check_token()
        _, files = self.find_commit(repo_id, revision)
        files = dict(files)
        for key, value in ((line["key"], line["value"]) for line in map(json.loads, self.body.splitlines())):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.lfs_objects[value["oid"]]
            elif key != "header":
                raise _HubError(HTTPStatus.BAD_REQUEST, f"This Hub has no operation {key!r}")
        oid = self.find_repo(repo_id).add_commit(files)
        self.send({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}"})

    def resolve(self, repo_id: str, revision: str, path: str):
        oid, files = self.find_commit(repo_id, revision)
        if path not in files:
            message = f"{path} does not exist on {revision}"
            raise _HubError(HTTPStatus.NOT_FOUND, message, "EntryNotFound", **{"X-Repo-Commit": oid})
        etag = f'"{self.etag(path, files[path])}"'
        self.send(files[path], **{"ETag": etag, "X-Repo-Commit": oid, "Content-Type": "application/octet-stream"})

    @staticmethod
    def etag(path: str, content: bytes) -> str:
        return hashlib.sha256(content).hexdigest() if path.endswith(".safetensors") else git_oid(content)
