"""A Hub on the loopback interface: one data set, as much of the protocol as its clients ask for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(name: str, files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serve data set `name`; gives the endpoint and the list of requests as they come."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            if path.startswith(f"/datasets/{name}/resolve/"):
                return self.file(path.split("/", 6)[6])
            if path.startswith(f"/api/datasets/{name}/paths-info/"):
                wanted = json.loads(body)["paths"] if body[:1] == b"{" else []
                found = [entry for entry in tree("", True) if entry["path"] in wanted]
                return self.json(found)
            if path.startswith(f"/api/datasets/{name}/tree/"):
                recursive = "recursive=true" in self.path.lower()
                return self.json(tree([*path.split("/", 7), ""][7], recursive))
            if path == f"/api/datasets/{name}" or path.startswith(f"/api/datasets/{name}/revision"):
                siblings = [{"rfilename": file} for file in files]
                about = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": []}
                return self.json(about | {"private": False, "gated": False, "disabled": False})
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

        do_GET = do_HEAD = do_POST = answer

        def file(self, path: str) -> None:
            if path not in files:
                headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
                return self.send(404, b"", headers)
            data = files[path]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(data)}"', "Accept-Ranges": "bytes"}
            span = self.headers.get("Range")
            if span and self.command == "GET":
                first, _, last = span.removeprefix("bytes=").partition("-")
                start, stop = int(first or 0), int(last) + 1 if last else len(data)
                headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
                return self.send(206, data[start:stop], headers)
            return self.send(200, data, headers)

        def json(self, value: object) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    def tree(under: str, recursive: bool = False) -> list[dict[str, object]]:
        folder = f"{under}/" if under else ""
        found: list[dict[str, object]] = []
        for path, data in files.items():
            if not path.startswith(folder):
                continue
            rest = path.removeprefix(folder)
            if "/" in rest and not recursive:
                entry = {"type": "directory", "path": folder + rest.split("/")[0], "oid": "0" * 40}
                if entry not in found:
                    found.append(entry)
            else:
                found.append({"type": "file", "path": path, "size": len(data), "oid": etag(data)})
        return found

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def etag(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
