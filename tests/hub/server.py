"""A stand-in for the Hugging Face hub on the loopback interface.

It answers what transformers, huggingface_hub and datasets ask: where files are, their bytes, the
commit of a branch, lists of files. As on the hub, large files are elsewhere (status 302) and small
ones in a cache (307), and whoever has no login gets 401 for a repository that does not exist.
"""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = {".safetensors", ".bin", ".parquet"}


@dataclass(frozen=True, eq=False)
class Fault:
    """What goes wrong with the requests that match.

    Attributes:
        match: regular expression for "METHOD /path".
        status: the answer's status; 0: the request is answered as usual.
        after, times: how many matching requests are spared first, and how many then go wrong.
        stall: seconds before the answer.
        cut: bytes of the body after which the connection ends.
        html: the answer is a page, as of a proxy that asks for a login.
        move: repository -> commit that its branch main has from then on.
    """

    match: str
    status: int = 0
    after: int = 0
    times: int = 10**9
    stall: float = 0
    cut: int | None = None
    html: bool = False
    move: dict[str, str] = field(default_factory=dict)


class Hub:
    """Repositories in a folder: `models/ORG/NAME/COMMIT/...` and `datasets/ORG/NAME/COMMIT/...`.

    Attributes:
        main: repository -> commit of its branch main.
        gated: repositories whose files need a login.
        faults: what goes wrong; of several that match, the first acts.
        requests: "STATUS METHOD /path" of every request so far.
    """

    def __init__(self, root: Path, main: dict[str, str]) -> None:
        self.root, self.main = root, dict(main)
        self.gated: set[str] = set()
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.hits: Counter[Fault] = Counter()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self})
        )
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, request: str) -> Fault | None:
        """The fault that acts on this request, if any."""
        with self.lock:
            for fault in self.faults:
                if re.search(fault.match, request):
                    self.hits[fault] += 1
                    if 0 < self.hits[fault] - fault.after <= fault.times:
                        self.main |= fault.move
                        return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.fault = self.hub.fault(f"{self.command} {path}")
        try:
            if self.fault:
                time.sleep(self.fault.stall)
            if self.fault and self.fault.html:
                page = b"<!DOCTYPE html><html><body>Log in to this network</body></html>"
                self._send(200, page, {"Content-Type": "text/html"})
            elif self.fault and self.fault.status:
                self._send_error(self.fault.status, None, "made to fail")
            else:
                self._route(path, parse_qs(url.query), body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_POST = do_GET

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.hub.requests.append(f"{status} {self.command} {unquote(urlsplit(self.path).path)}")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.cut is not None:
            body, self.close_connection = body[: self.fault.cut], True
        self.wfile.write(body)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_error(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        name = r"(?P<name>[^/]+/[^/]+)"
        revision = r"(?P<revision>refs/[^/]+/[^/]+|[^/]+)"
        if match := re.fullmatch(rf"/bytes/(models|datasets)/{name}/([0-9a-f]{{40}})/(.+)", path):
            self._send_file(match[1], match["name"], match[3], match[4])
        elif match := re.fullmatch(rf"/(datasets/)?{name}/resolve/{revision}/(?P<file>.+)", path):
            kind = "datasets" if match[1] else "models"
            if found := self._find(kind, match["name"], match["revision"]):
                self._resolve(kind, match["name"], *found, match["file"])
        elif match := re.fullmatch(rf"/api/(models|datasets)/{name}/auth-check", path):
            if self._find(match[1], match["name"], "main"):
                self._send_json({})
        elif match := re.fullmatch(
            rf"/api/(models|datasets)/{name}(?:/(?P<what>revision|tree|paths-info)/{revision}"
            rf"(?:/(?P<under>.+))?)?",
            path,
        ):
            self._answer_api(match.groupdict() | {"kind": match[1]}, query, body)
        else:
            self._send_error(404, None, f"no route for {path}")

    def _find(
        self, kind: str, name: str, revision: str, files: bool = True
    ) -> tuple[Path, str] | None:
        """The folder of a commit, and the commit; or None after the error was sent."""
        login = bool(self.headers.get("Authorization"))
        commit = self.hub.main.get(name) if revision == "main" else revision
        if not (self.hub.root / kind / name).is_dir():
            self._send_error(404 if login else 401, "RepoNotFound", "Repository not found")
        elif files and name in self.hub.gated and not login:
            self._send_error(401, "GatedRepo", f"Access to {name} is restricted. Please log in.")
        elif commit is None or not (self.hub.root / kind / name / commit).is_dir():
            self._send_error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return self.hub.root / kind / name / commit, commit
        return None

    def _resolve(self, kind: str, name: str, folder: Path, commit: str, path: str) -> None:
        file = folder / path
        headers = {"X-Repo-Commit": commit}
        if not file.is_file():
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self._send(404, b"Entry not found", headers)
            return
        tag = f'"{_digest(file)}"'
        headers |= {
            "Location": f"/bytes/{kind}/{name}/{commit}/{path}",
            "X-Linked-Size": str(file.stat().st_size),
            "X-Linked-ETag": tag,
            "ETag": tag,
        }
        if file.suffix in LARGE:  # the hub gives the whole address of another host
            headers["Location"] = self.hub.url + headers["Location"]
        self._send(302 if file.suffix in LARGE else 307, b"", headers)

    def _send_file(self, kind: str, name: str, commit: str, path: str) -> None:
        file = self.hub.root / kind / name / commit / path
        data, headers = file.read_bytes(), {"ETag": f'"{_digest(file)}"', "X-Repo-Commit": commit}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._send(206, data[first : last + 1], headers)
        else:
            self._send(200, data, headers)

    def _answer_api(self, asked: dict[str, Any], query: dict[str, list[str]], body: bytes) -> None:
        what, name = asked["what"], asked["name"]
        found = self._find(asked["kind"], name, asked["revision"] or "main", files=False)
        if not found:
            return
        folder, commit = found
        if what == "tree":
            base = folder / (asked["under"] or "")
            deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            if base.exists():
                files = sorted(base.rglob("*") if deep else base.iterdir())
                self._send_json([_entry(file, folder) for file in files])
            else:
                self._send_error(404, "EntryNotFound", f"{asked['under']} does not exist")
        elif what == "paths-info":
            form = "json" not in (self.headers.get("Content-Type") or "")
            paths = (parse_qs(body.decode()) if form else json.loads(body)).get("paths", [])
            files = [folder / path for path in paths if path.strip("/")]
            self._send_json([_entry(file, folder) for file in files if file.exists()])
        else:
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
            gated = "auto" if name in self.hub.gated else False
            more = {"private": False, "gated": gated, "disabled": False, "tags": []}
            self._send_json({"id": name, "sha": commit, "siblings": siblings, **more})


def _entry(file: Path, folder: Path) -> dict[str, Any]:
    path = str(file.relative_to(folder))
    if file.is_dir():
        return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
    size, digest = file.stat().st_size, _digest(file)
    entry = {"type": "file", "path": path, "oid": digest[:40], "size": size}
    large = {"lfs": {"oid": digest, "size": size, "pointerSize": 134}}
    return entry | (large if file.suffix in LARGE else {})


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
