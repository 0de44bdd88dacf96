# Copyright 2026 The reformer_hf authors. Licensed under the Apache License, Version 2.0.
"""
A Hub on loopback, in memory: the endpoints that `huggingface_hub` calls to push models and to load them again.

Users, private repositories, branches and tags are as on the Hub; files are stored by LFS, not Xet. Tests can interfere
with each endpoint, see `HubServer.before`.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_REPO, _REVISION = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
# Method, path and the method of `Handler` that answers, which takes the path's named groups.
_ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/models/{_REPO}(/revision/{_REVISION})?", "repo_info"),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}(/(?P<folder>.+))?", "list_tree"),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", "create_branch"),
    ("POST", rf"/api/models/{_REPO}/tag/{_REVISION}", "create_tag"),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", "preupload"),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", "commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", rf"/lfs/{_REPO}/(?P<oid>[0-9a-f]{{64}})", "lfs_upload"),
    ("GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
    ("HEAD", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
]


def git_oid(content: bytes) -> str:
    """The name that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repo:
    """Commits, each a dictionary from path to content; branches and tags, each the name of a commit."""

    def __init__(self, private: bool = False):
        self.private = private
        self.lfs_objects: dict[str, bytes] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.add_commit("main", {})

    def add_commit(self, branch: str, files: dict[str, bytes]) -> str:
        listing = [len(self.commits), sorted((path, git_oid(content)) for path, content in files.items())]
        oid = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag or the name of a commit stands for."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None

    @property
    def files(self) -> dict[str, bytes]:
        """What `main` holds."""
        return self.commits[self.branches["main"]]


class HubServer(ThreadingHTTPServer):
    """
    Serves in a thread while its `with` block runs.

    `users` are names by token. Who bears a token writes to the repositories of that name, and reads those of others
    that are not private.
    """

    daemon_threads = True

    def __init__(self, users: dict[str, str]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.users = users
        self.repos: dict[str, Repo] = {}
        # Names of the endpoints that were called, as in `_ROUTES`.
        self.calls: list[str] = []
        # Functions that are called with the handler before an endpoint reads its request, by the name of the endpoint.
        self.before: dict[str, Callable[[Handler], None]] = {}
        self.commit_lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Nothing on stderr: a client that goes away is no error of the server."""

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        super().__exit__(*exception)


class HubError(Exception):
    """An answer other than success, with what tells the client which exception to raise."""

    def __init__(self, status: HTTPStatus, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Handler(BaseHTTPRequestHandler):
    """One request. `lose_answer` cuts the connection where the answer would be sent."""

    server: HubServer
    lose_answer = False

    def log_message(self, *args):
        """Nothing on stderr."""

    @cached_property
    def body(self) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError(f"Received {len(body)} of {length} bytes.")
        return body

    def cut(self):
        """Cut the connection."""
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError("The connection was cut.")

    def answer(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            for method, pattern, name in _ROUTES:
                if method == self.command and (match := re.fullmatch(pattern, url.path)):
                    self.server.calls.append(name)
                    if name in self.server.before:
                        self.server.before[name](self)
                    groups = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    return getattr(self, name)(**groups)
            raise HubError(HTTPStatus.NOT_FOUND, f"This Hub has no endpoint {self.command} {url.path}")
        except HubError as error:
            # What is not read is lost to the client, and with it the answer.
            _ = self.body
            self.send({"error": str(error)}, error.status, **error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, content: bytes | dict | list, status: HTTPStatus = HTTPStatus.OK, **headers: str):
        if self.lose_answer:
            self.cut()
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def user(self) -> str | None:
        """Who asks, or `None` without a token."""
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.server.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(HTTPStatus.UNAUTHORIZED, "Invalid credentials in Authorization header")
        return user

    def check_write_access(self, repo_id: str):
        if self.user is None:
            raise HubError(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        if repo_id.split("/")[0] != self.user:
            raise HubError(HTTPStatus.FORBIDDEN, f"{self.user} may not write to {repo_id}")

    def find_repo(self, repo_id: str) -> Repo:
        repo, user = self.server.repos.get(repo_id), self.user
        # As on the Hub, a private repository looks to others like one that does not exist.
        if repo is None or repo.private and user != repo_id.split("/")[0]:
            status = HTTPStatus.UNAUTHORIZED if user is None else HTTPStatus.NOT_FOUND
            raise HubError(status, "Repository not found", "RepoNotFound")
        return repo

    def find_commit(self, repo_id: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        repo = self.find_repo(repo_id)
        oid = repo.find(revision or "main")
        if oid is None:
            raise HubError(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repo.commits[oid]

    def whoami(self):
        if self.user is None:
            raise HubError(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        self.send({"type": "user", "name": self.user, "orgs": []})

    def create_repo(self):
        request = json.loads(self.body)
        repo_id = f"{request['organization'] or self.user}/{request['name']}"
        self.check_write_access(repo_id)
        status = HTTPStatus.CONFLICT if repo_id in self.server.repos else HTTPStatus.OK
        self.server.repos.setdefault(repo_id, Repo(private=request.get("visibility") == "private"))
        self.send({"url": f"{self.server.url}/{repo_id}"}, status)

    def validate_yaml(self):
        self.send({"errors": [], "warnings": []})

    def repo_info(self, repo_id: str, revision: str | None):
        oid, files = self.find_commit(repo_id, revision)
        private = self.find_repo(repo_id).private
        self.send({"id": repo_id, "sha": oid, "private": private, "siblings": [{"rfilename": path} for path in files]})

    def list_tree(self, repo_id: str, revision: str, folder: str | None):
        _, files = self.find_commit(repo_id, revision)
        prefix = f"{folder}/" if folder else ""
        found = {path: content for path, content in files.items() if path.startswith(prefix)}
        if folder and not found:
            raise HubError(HTTPStatus.NOT_FOUND, f"{folder} does not exist on {revision}", "EntryNotFound")
        entries = []
        for path, content in found.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if is_lfs(path):
                entry["lfs"] = {"oid": self.etag(path, content), "size": len(content), "pointerSize": 134}
            if self.query.get("recursive") == ["true"] or "/" not in path.removeprefix(prefix):
                entries.append(entry)
        self.send(entries)

    def create_branch(self, repo_id: str, branch: str):
        self.check_write_access(repo_id)
        oid, _ = self.find_commit(repo_id, json.loads(self.body or b"{}").get("startingPoint"))
        self.add_reference(self.find_repo(repo_id).branches, branch, oid)

    def create_tag(self, repo_id: str, revision: str):
        self.check_write_access(repo_id)
        oid, _ = self.find_commit(repo_id, revision)
        self.add_reference(self.find_repo(repo_id).tags, json.loads(self.body)["tag"], oid)

    def add_reference(self, references: dict[str, str], name: str, oid: str):
        if name in references:
            raise HubError(HTTPStatus.CONFLICT, f"Reference already exists: {name}")
        references[name] = oid
        self.send({"ref": name, "oid": oid})

    def preupload(self, repo_id: str, revision: str):
        """How to upload each file (weights as on the Hub, by LFS), and what the commit holds there already."""
        self.check_write_access(repo_id)
        _, files = self.find_commit(repo_id, revision)
        answers = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            mode = "lfs" if is_lfs(path) else "regular"
            oid = self.etag(path, files[path]) if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send({"files": answers})

    def lfs_batch(self, repo_id: str):
        """Where to upload what is not there yet."""
        self.check_write_access(repo_id)
        stored = self.find_repo(repo_id).lfs_objects
        address = f"{self.server.url}/lfs/{repo_id}"
        objects = [
            each if each["oid"] in stored else {**each, "actions": {"upload": {"href": f"{address}/{each['oid']}"}}}
            for each in json.loads(self.body)["objects"]
        ]
        self.send({"transfer": "basic", "objects": objects})

    def lfs_upload(self, repo_id: str, oid: str):
        """No token here: on the Hub the address itself is signed."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(HTTPStatus.BAD_REQUEST, f"The content is not that of {oid}")
        self.server.repos[repo_id].lfs_objects[oid] = self.body
        self.send(b"")

    def commit(self, repo_id: str, revision: str):
        """All operations or, if one of them or the parent is not as it must be, none."""
        self.check_write_access(repo_id)
        lines = [json.loads(line) for line in self.body.splitlines()]
        with self.server.commit_lock:
            repo = self.find_repo(repo_id)
            if revision not in repo.branches:
                raise HubError(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = repo.branches[revision]
            files = dict(repo.commits[head])
            for key, value in ((line["key"], line["value"]) for line in lines):
                if key == "header" and value.get("parentCommit", head) != head:
                    message = "A commit has happened since. Please refresh and try again."
                    raise HubError(HTTPStatus.PRECONDITION_FAILED, message)
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile" and value["oid"] in repo.lfs_objects:
                    files[value["path"]] = repo.lfs_objects[value["oid"]]
                elif key == "deletedFile" and value["path"] in files:
                    del files[value["path"]]
                elif key != "header":
                    raise HubError(HTTPStatus.BAD_REQUEST, f"This Hub cannot do {key!r} for {value['path']}")
            oid = repo.add_commit(revision, files)
        self.send({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}"})

    def resolve(self, repo_id: str, revision: str, path: str):
        oid, files = self.find_commit(repo_id, revision)
        if path not in files:
            message = f"{path} does not exist on {revision}"
            raise HubError(HTTPStatus.NOT_FOUND, message, "EntryNotFound", **{"X-Repo-Commit": oid})
        etag = f'"{self.etag(path, files[path])}"'
        self.send(files[path], **{"ETag": etag, "X-Repo-Commit": oid, "Content-Type": "application/octet-stream"})

    @staticmethod
    def etag(path: str, content: bytes) -> str:
        return hashlib.sha256(content).hexdigest() if is_lfs(path) else git_oid(content)


def is_lfs(path: str) -> bool:
    """Whether the Hub stores a file apart from git."""
    return path.endswith((".safetensors", ".bin", ".pt", ".pth"))
