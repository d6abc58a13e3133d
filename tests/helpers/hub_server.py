"""A stand-in for the Hub of Hugging Face, as far as its client uploads a model and transformers loads one: repositories in memory.

`running()` gives one at work, in a thread. Another process finds it by its environment `hub.environment(home)`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"  # noqa: S105  # of nobody


class Hub:
    """What was sent.

    repositories  {repo_id: {branch: {path: content}}}
    private       {repo_id: whether it was made so}
    commits       {repo_id: [the first line of each commit's payload]}
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.commits: dict[str, list[dict[str, Any]]] = {}
        self.requests: list[str] = []
        self.endpoint = ""

    def environment(self, home: Any, token: str = TOKEN) -> dict[str, str]:
        """For a process that takes this for the Hub."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_", "HUGGING"))}
        return {**kept, "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1"}

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        branches = self.repositories.get(repo, {})
        return next((files for name, files in branches.items() if revision in (name, commit_of(files))), None)


def commit_of(files: dict[str, bytes]) -> str:
    """The commit in which a branch has these files."""
    return hashlib.sha1(repr(sorted(files.items())).encode(), usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            self._known() and self._json({"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            files = self.hub.files(found[1], found[2])
            entries = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in (files or {}).items()]
            self._missing("Revision") if files is None else self._json(entries)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            files = self.hub.files(found[1], found[2] or "main")
            siblings = [{"rfilename": name} for name in files or ()]
            about = {"id": found[1], "sha": commit_of(files or {}), "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            self._missing("Repo") if files is None else self._json(about)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            files = self.hub.files(found[1], found[2])
            if files is None or found[3] not in files:
                self._missing("Repo" if files is None else "Entry", commit_of(files or {}))
            else:
                data = files[found[3]]
                etag = hashlib.sha256(data).hexdigest()
                self._answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit_of(files), "Accept-Ranges": "bytes"})
        else:
            self._missing("Entry")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._known():
            return
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            said = json.loads(body)
            repo = f"{said.get('organization') or 'me'}/{said['name']}"
            if repo in self.hub.repositories:
                self._json({"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{repo}"}, 409)
                return
            if repo.startswith("others/"):
                self._json({"error": "You don't have the rights to create a model under the namespace 'others'"}, 403)
                return
            self.hub.repositories[repo] = {"main": {".gitattributes": b""}}
            self.hub.private[repo] = said.get("visibility") == "private" or said.get("private") is True
            self._json({"url": f"{self.hub.endpoint}/{repo}", "id": repo, "name": repo})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            branches = self.hub.repositories[found[1]]
            branches.setdefault(found[2], dict(branches["main"]))
            self._json({})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
            self._json({"files": files})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            files = self.hub.repositories[found[1]][found[2]]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.hub.commits.setdefault(found[1], []).append(entry["value"])
                elif entry["key"] == "deletedFile":
                    del files[entry["value"]["path"]]
                else:
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            oid = commit_of(files)
            self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{found[1]}/commit/{oid}"})
        else:
            self._missing("Entry")

    def _known(self) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not known:
            self._json({"error": "Invalid credentials in Authorization header"}, 401)
        return known

    def _missing(self, what: str, commit: str = "") -> None:
        more = {"X-Error-Code": f"{what}NotFound"} | ({"X-Repo-Commit": commit} if commit else {})
        self._answer(404, json.dumps({"error": f"{what} not found"}).encode(), more)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub at work."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)  # how often it looks whether it is to end
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
