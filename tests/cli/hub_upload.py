"""As much of the hub's HTTP interface as sending files to it needs: it keeps what it is sent."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hub_server import HubServer, QuietHandler

TOKEN = "hf_the_token_of_a_test"


class UploadHub(HubServer):
    """What was asked for and what was sent."""

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.made: list[dict[str, Any]] = []
        self.branches: list[str] = []
        self.files: dict[str, bytes] = {}
        """Of the commits, by path."""
        self.commits: list[str] = []
        """The revisions that they went to."""
        self.objects: dict[str, bytes] = {}
        self.refuse = 0
        """Answers with this to everything."""


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    """A hub at work."""
    server = UploadHub()
    with server.at_work():
        yield server


class _Handler(QuietHandler):
    server: UploadHub

    def _answer(self, tree: object, status: int = 200) -> None:
        body = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        body = self._body()
        if self.server.refuse:
            return self._answer({"error": "refused"}, self.server.refuse)
        if not self.path.startswith("/lfs") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "who are you?"}, 401)
        if self.path.endswith("/repos/create"):
            self.server.made.append(json.loads(body))
            return self._answer({"url": f"{self.server.address}/somebody/model", "name": "somebody/model"})
        if "/branch/" in self.path:
            self.server.branches.append(self.path.rpartition("/")[2])
            return self._answer({})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self._answer({"files": [_way(file["path"]) for file in files]})
        if self.path.endswith("/validate-yaml"):
            return self._answer({"errors": [], "warnings": []})
        if self.path.endswith("/info/lfs/objects/batch"):
            return self._answer(self._batch(json.loads(body)["objects"]))
        if "/commit/" in self.path:
            self.server.commits.append(self.path.rpartition("/")[2])
            for line in body.splitlines():
                self._keep(json.loads(line))
            return self._answer(
                {"commitUrl": f"{self.server.address}/somebody/model/commit/1", "commitOid": "1" * 40}
            )
        return self._answer({"error": self.path}, 404)

    def _batch(self, objects: list[dict[str, Any]]) -> dict[str, Any]:
        """Where large files are put, each under its SHA-256."""
        found = [
            {
                **one,
                "actions": {"upload": {"href": f"{self.server.address}/lfs/{one['oid']}", "header": {}}},
            }
            for one in objects
        ]
        return {"transfer": "basic", "objects": found}

    def _keep(self, line: dict[str, Any]) -> None:
        value = line["value"]
        if line["key"] == "file":
            self.server.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            content = self.server.objects[value["oid"]]
            assert hashlib.sha256(content).hexdigest() == value["oid"]
            self.server.files[value["path"]] = content


def _way(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}
