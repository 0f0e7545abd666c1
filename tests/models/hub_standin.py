"""As much of the hub's HTTP interface as reading from it needs, with the ways in which a hub fails.

A folder holds ``models/OWNER/NAME/…`` and ``datasets/OWNER/NAME/…``. The libraries learn of it by
``HF_ENDPOINT`` when they are imported, so that what reads from it is a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

from hub_server import HubServer, QuietHandler

COMMIT = "a" * 40


class Hub(HubServer):
    """What it has, how it fails, and what it was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(_Handler)
        self.folder = folder
        self.asked: list[str] = []
        """Requests for files, with their ranges."""
        self.be_well()

    def be_well(self) -> None:
        """No fault from here on."""
        self.status: int | None = None
        """Answers with this to ``times`` requests that name ``of``."""
        self.of, self.times = "", 0
        self.headers: Mapping[str, str] = {}
        self.cuts = 0
        """Closes the connection in the middle of so many files of weights."""
        self.asked.clear()

    def fail(self, status: int, times: int = 1 << 30, of: str = "", **headers: str) -> None:
        """Answer so; names of headers have ``_`` for ``-``."""
        self.be_well()
        self.status, self.times, self.of = status, times, of
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def files(self, kind: str, repo: str) -> list[str]:
        base = self.folder / kind / repo
        return sorted(str(path.relative_to(base)) for path in base.rglob("*") if path.is_file())


@contextmanager
def hub_at_work(folder: Path) -> Iterator[Hub]:
    """A hub of what lies in ``folder``."""
    server = Hub(folder)
    with server.at_work():
        yield server


class _Handler(QuietHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def _answer(self, status: int, body: object = b"", headers: Mapping[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub, url = self.server, urlparse(self.path)
        path = unquote(url.path)
        if hub.status is not None and hub.times > 0 and hub.of in path:
            hub.times -= 1
            return self._answer(hub.status, {"error": "refused"}, hub.headers)
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?", path):
            kind, repo, rest = found[1], found[2], found[3] or ""
            if not hub.files(kind, repo):
                return self._answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            return self._about(kind, repo, rest, parse_qs(url.query), body)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file("datasets" if found[1] else "models", found[2], found[4])
        return self._answer(404, {"error": path})

    do_GET = do_HEAD = do_POST = _any

    def _about(self, kind: str, repo: str, rest: str, query: dict[str, list[str]], body: bytes) -> None:
        """A repository: what it is, what lies in it."""
        files = self.server.files(kind, repo)
        if rest.startswith("/tree"):
            _, _, _, *inside = rest.split("/", 3)
            deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            return self._answer(200, _tree(self.server, kind, repo, "".join(inside), deep))
        if rest.startswith("/paths-info"):
            if b"paths=" in body:
                wanted = parse_qs(body.decode()).get("paths", [])
            else:
                wanted = json.loads(body or b"{}").get("paths", [])
            entries = [_entry(self.server, kind, repo, path) for path in wanted if path in files]
            folders = [
                path for path in wanted if any(name.startswith(f"{path.rstrip('/')}/") for name in files)
            ]
            return self._answer(200, entries + [_folder(path) for path in folders])
        if rest and not rest.startswith("/revision"):
            return self._answer(404, {"error": rest})
        if rest.rpartition("/")[2] not in ("", "main", COMMIT):
            return self._answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name} for name in files]
        known = {"_id": "x", "id": repo, "sha": COMMIT, "private": False, "gated": False, "disabled": False}
        times = dict.fromkeys(("lastModified", "createdAt"), "2026-01-01T00:00:00.000Z")
        return self._answer(
            200, {**known, **times, "tags": [], "likes": 0, "downloads": 0, "siblings": siblings}
        )

    def _file(self, kind: str, repo: str, name: str) -> None:
        hub, path = self.server, self.server.folder / kind / repo / name
        if not hub.files(kind, repo):
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if not path.is_file():
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = path.read_bytes()
        headers = {
            "Content-Type": "application/octet-stream",
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        asked = self.headers.get("Range") or ""
        if self.command == "GET":
            hub.asked.append(f"{name} {asked}".strip())
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", asked):
            first, last = int(part[1]), min(int(part[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._answer(206, content[first : last + 1], headers)
        if hub.cuts > 0 and name.endswith(".safetensors") and self.command == "GET":
            hub.cuts -= 1
            self.send_response(200)
            for header, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        return self._answer(200, content, headers)


def _folder(path: str) -> dict[str, object]:
    return {"type": "directory", "path": path, "oid": _id(path), "size": 0}


def _entry(hub: Hub, kind: str, repo: str, path: str) -> dict[str, object]:
    size = (hub.folder / kind / repo / path).stat().st_size
    return {"type": "file", "path": path, "size": size, "oid": _id(path)}


def _id(path: str) -> str:
    return hashlib.sha1(path.encode()).hexdigest()


def _tree(hub: Hub, kind: str, repo: str, within: str, deep: bool) -> list[dict[str, object]]:
    before = f"{within.rstrip('/')}/" if within else ""
    inside = [name for name in hub.files(kind, repo) if name.startswith(before)]
    parts = [name[len(before) :].split("/") for name in inside]
    folders = {before + "/".join(part[:depth]) for part in parts for depth in range(1, len(part))}
    if not deep:
        folders = {path for path in folders if "/" not in path[len(before) :]}
        inside = [name for name in inside if "/" not in name[len(before) :]]
    return [_folder(path) for path in sorted(folders)] + [_entry(hub, kind, repo, name) for name in inside]
