"""A simulated Hugging Face hub on this machine, asked through the real huggingface_hub."""
import hashlib
import json
import re
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import huggingface_hub.utils
import pytest

from minikd import hub


class Request(BaseHTTPRequestHandler):
    """The hub's protocol, as far as downloads need it: a repository's files with its commit, and each file."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        served = self.server
        served.asked.append(self.path)
        for pattern, (status, headers, body) in served.faults.items():
            if fnmatch(self.path, pattern):
                return self.reply(status, body, headers)
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?(/tree/([^/?]+).*)?", self.path):
            kind, name, revision, tree, of = found.groups()
            commit, files = self.find(kind, name, of or revision or "main")
            if files is None:
                return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound" if commit else "RepoNotFound"})
            if tree:
                listing = [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                           for path, data in files.items()]
            else:
                listing = {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
            return self.reply(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
        if not (found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)):
            return self.reply(404, b"{}", {})                   # what huggingface_hub asks beside
        kind, name, revision, path = found.groups()
        commit, files = self.find("datasets" if kind else "models", name, revision)
        self.reply(200, files[path], {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"'})
        if self.command == "GET":
            served.sent.append(path)

    do_HEAD = do_GET

    def find(self, kind: str, name: str, revision: str):
        commits = self.server.repositories.get((kind, name), {})
        commit = [*commits, None][-2:][0] if revision == "main" else revision
        return commit if commits else None, commits.get(commit)

    def reply(self, status: int, body: bytes, headers: dict):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body)), "X-Request-Id": "1"} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def server():
    """One for all tests: old versions of huggingface_hub remember its address; older ones also the user's cache."""
    pytest.importorskip("huggingface_hub", minversion="0.25")
    with ThreadingHTTPServer(("127.0.0.1", 0), Request) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def served(server, tmp_path, monkeypatch):
    """A hub.  repositories: ("models", "org/name") -> {commit: {path: bytes}}, main is the last; asked: every request's path;
    sent: every file; faults: glob of a path -> (status, headers, body)."""
    server.repositories, server.asked, server.sent, server.faults = {}, [], [], {}
    address = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in dict(ENDPOINT=address, HUGGINGFACE_CO_URL_TEMPLATE=address + "/{repo_id}/resolve/{revision}/{filename}",
                            HF_HUB_CACHE=str(tmp_path / "my cache"), HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True).items():
        monkeypatch.setattr(huggingface_hub.constants, name, value, raising=False)       # the last is new
    monkeypatch.setattr("time.sleep", lambda _: None)           # before huggingface_hub's further tries
    monkeypatch.chdir(tmp_path)
    again()
    yield server
    again()


def again():
    """Forgets what this process knows of the hub, as if another one began."""
    hub.KNOWN.clear()
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()            # old versions' sessions are offline or not
