"""A server on loopback that speaks the protocols of four hubs, and fails where it is told to.

Written after what the client libraries send and expect: huggingface_hub 0.36, modelscope-hub 0.5, aistudio-sdk 0.2.6
(with the listing that 0.3 uses), and PaddleNLP's downloads of community files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPO = "Qwen/Tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors"  # what is in LFS


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def pointer(content: bytes) -> bytes:
    """What git has in the place of a file in LFS."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n".encode()


@dataclass
class HubState:
    """What is served, what goes wrong, and what was asked for.

    Attributes:
        files: Name -> content, of the model and the dataset `REPO`.
        refuse: A status for every request; with `refuse_files` only for contents.
        cut: Bytes after which a large file's connection breaks, one for each request, while there are any.
        silent: Of "listing" or "files", what is never answered.
        damaged: Large files arrive with a byte changed.
        commit: What main and v1 stand for.
        asked: (method, path) of every request.
        sent: (name, Range) of every content.
    """

    files: dict[str, bytes]
    refuse: int | None = None
    refuse_files: int | None = None
    cut: list[int] = field(default_factory=list)
    silent: str | None = None
    damaged: bool = False
    commit: str = COMMIT
    asked: list[tuple[str, str]] = field(default_factory=list)
    sent: list[tuple[str, str | None]] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def fetched(self) -> list[str]:
        """Names of the files whose contents were sent, once for each time."""
        return [name for name, _ in self.sent]

    def ranges(self) -> list[str]:
        """The ranges that were asked for and sent."""
        return [asked for _, asked in self.sent if asked]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: HubState
    base: str

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        self.state.asked.append((self.command, self.path))
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if self.state.refuse:
            return self._refuse(self.state.refuse)
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, url.path):
                return answer(self, *map(unquote, match.groups()), **({"query": query}))
        self._refuse(404)

    # -- answers ---------------------------------------------------------------------------------------------

    def _refuse(self, status: int, code: str | None = None) -> None:
        codes = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}
        headers = {"Retry-After": "7"} if status == 429 else {}
        self._send(status, b'{"message": "no"}', headers | {"X-Error-Code": code or codes.get(status, "")})

    def _json(self, value: object) -> None:
        if self.state.silent == "listing":
            self.state.closing.wait()
            self.close_connection = True
            return
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _redirect(self, name: str, headers: dict[str, str]) -> None:
        self._send(302, b"", headers | {"Location": f"{self.base}/cdn/{name}"})

    def _content(self, name: str, headers: dict[str, str] | None = None) -> None:
        """The bytes of a file, from where they are asked for, or as far as the faults let it come."""
        content = self.state.files.get(name)
        if content is None or self.state.refuse_files:
            return self._refuse(self.state.refuse_files or 404, "EntryNotFound" if content is None else None)
        if self.state.silent == "files" and self.command == "GET":
            self.state.closing.wait()
            self.close_connection = True
            return
        whole, large = len(content), name.endswith(LARGE)
        if self.state.damaged and large:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        end = int(asked[2]) + 1 if asked and asked[2] else whole
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{whole}")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "GET":
            self.state.sent.append((name, self.headers.get("Range")))
            cut = self.state.cut.pop(0) if self.state.cut and large else None
            self.wfile.write(content[start : min(end, start + cut) if cut is not None else end])
            self.close_connection = cut is not None

    # -- Hugging Face ----------------------------------------------------------------------------------------

    def hf_info(self, revision: str, query: dict[str, str]) -> None:
        if revision not in ("main", "v1", self.state.commit):
            return self._refuse(404, "RevisionNotFound")
        siblings = []
        for name, content in self.state.files.items():
            lfs = {"size": len(content), "sha256": sha256(content), "pointerSize": len(pointer(content))}
            blob = git_sha(pointer(content) if name.endswith(LARGE) else content)
            entry = {"rfilename": name, "size": len(content), "blobId": blob}
            siblings.append(entry | ({"lfs": lfs} if name.endswith(LARGE) else {}))
        self._json({"id": REPO, "sha": self.state.commit, "siblings": siblings})

    def hf_info_main(self, query: dict[str, str]) -> None:
        self.hf_info("main", query)

    def hf_file(self, revision: str, name: str, query: dict[str, str]) -> None:
        content = self.state.files.get(name)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        large = name.endswith(LARGE)
        tag = sha256(content) if large else git_sha(content)
        headers = {"X-Repo-Commit": self.state.commit, "ETag": f'"{tag}"'}
        if self.state.refuse_files:
            return self._refuse(self.state.refuse_files)
        if large:
            linked = {"X-Linked-ETag": f'"{tag}"', "X-Linked-Size": str(len(content))}
            return self._redirect(name, headers | linked)
        self._content(name, headers)

    def cdn(self, name: str, query: dict[str, str]) -> None:
        self._content(name)

    # -- ModelScope ------------------------------------------------------------------------------------------

    def modelscope_list(self, kind: str, query: dict[str, str]) -> None:
        if query["Revision"] not in ("master", "v1"):
            return self._refuse(404)
        files = [
            {"Path": name, "Name": name, "Size": len(content), "Sha256": sha256(content), "Type": "blob"}
            for name, content in self.state.files.items()
        ]
        folders = [{"Path": "sub", "Name": "sub", "Size": 0, "Type": "tree"}]
        self._json({"Code": 200, "Success": True, "Data": {"Files": files + folders}})

    def modelscope_file(self, kind: str, query: dict[str, str]) -> None:
        self._content(query["FilePath"])

    # -- AI Studio -------------------------------------------------------------------------------------------

    def aistudio_permit(self, query: dict[str, str]) -> None:
        self._json({"errorCode": 0, "errorMsg": "", "logId": "1"})

    def aistudio_contents(self, path: str, query: dict[str, str]) -> None:
        if query.get("ref", "master") not in ("master", "v1"):
            return self._refuse(404)
        if path in self.state.files:
            return self._json(self._aistudio_entry(path))
        inside = [name for name in self.state.files if name.startswith(f"{path}/" if path else "")]
        depth = path.count("/") + 1 if path else 0
        files = [self._aistudio_entry(name) | {"content": None} for name in inside if name.count("/") == depth]
        folders = {"/".join(name.split("/")[: depth + 1]) for name in inside if name.count("/") > depth}
        self._json(files + [{"type": "dir", "path": folder, "name": folder, "size": 0} for folder in sorted(folders)])

    def _aistudio_entry(self, name: str) -> dict[str, object]:
        content = self.state.files[name]
        stored = pointer(content) if name.endswith(LARGE) else content
        entry = {"name": name.rpartition("/")[2], "path": name, "type": "file", "size": len(content)}
        return entry | {"sha": git_sha(stored), "content": base64.b64encode(stored).decode(), "last_commit_sha": COMMIT}

    def aistudio_file(self, name: str, query: dict[str, str]) -> None:
        self._redirect(name, {}) if name.endswith(LARGE) and name in self.state.files else self._content(name)

    # -- PaddleNLP -------------------------------------------------------------------------------------------

    def paddlenlp_file(self, name: str, query: dict[str, str]) -> None:
        if self.state.silent == "listing" and self.command == "HEAD":
            self.state.closing.wait()
            self.close_connection = True
            return
        tag = hashlib.md5(self.state.files.get(name, b"")).hexdigest()
        self._content(name, {"ETag": f'"{tag}"'})


_ROUTES = [
    (rf"/api/models/{REPO}", _Handler.hf_info_main),
    (rf"/api/models/{REPO}/revision/([^/]+)", _Handler.hf_info),
    (rf"/{REPO}/resolve/([^/]+)/(.+)", _Handler.hf_file),
    (r"/cdn/(.+)", _Handler.cdn),
    (rf"/api/v1/(models)/{REPO}/repo/files", _Handler.modelscope_list),
    (rf"/api/v1/(datasets)/{REPO}/repo/tree", _Handler.modelscope_list),
    (rf"/api/v1/(models|datasets)/{REPO}/repo", _Handler.modelscope_file),
    (r"/modelcenter/v2/models/sdk/checkPermit", _Handler.aistudio_permit),
    (rf"/api/v1/repos/{REPO}/contents/(.*)", _Handler.aistudio_contents),
    (rf"/api/v1/repos/{REPO}/media/(.+)", _Handler.aistudio_file),
    (rf"/community/{REPO}/(.+)", _Handler.paddlenlp_file),
]


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[tuple[str, HubState]]:
    """The server's address and its state; it is reached from this machine only."""
    state = HubState(dict(files))
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.base = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield handler.base, state
    finally:
        state.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
