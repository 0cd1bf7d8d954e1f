"""A Hugging Face hub on loopback: downloads, pushes over LFS and Xet, and what can go wrong.

`with Hub(tmp_path) as hub:`, then `hub.commit("model", "owner/name", {"a.txt": b"text"})`,
`hub.fault("GET", "/resolve/", status=429, headers={"Retry-After": "1"})`, `hub.log`, `hub.sent`;
clients are given `endpoint=hub.url`, processes `env=hub.env(home)`. `hub.tokens["hf_a"] = ["alice",
"acme"]` makes a token known: its user, the organizations, and "read-only" if it cannot write.
`hub.repos["model", "owner/name"]` has the switches and the references of a repository.
As a program: `server.py FOLDER --port 0` prints the address; FOLDER/models/OWNER/NAME and
FOLDER/datasets/OWNER/NAME become main, NAME@TAG beside it an earlier commit with that tag.
Storage listens on a port of its own (the real one: another host): clients send no token there.
"""

import argparse
import hashlib
import io
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import yaml

sys.path += [] if __package__ else [str(Path(__file__).resolve().parents[1])]
from hub.storage import ATTRIBUTES, OWN, READ_ONLY, XET, Refusal, Storage, card

KIND, ID = "(?P<kind>models|datasets)", "(?P<id>[^/]+/[^/]+?)"
VERB, REVISION, REST = r"(?P<verb>[\w-]+)", "(?P<revision>[^/]+)", "(?P<rest>.+)"
ROUTES = [
    r"/api/(repos/)?(?P<verb>whoami-v2|validate-yaml|create|delete)",
    f"/api/{KIND}/{ID}(/{VERB}(/{REVISION}(/{REST})?)?)?",
    f"(/{KIND})?/{ID}/(?P<verb>resolve)/{REVISION}/{REST}",
    rf"(/{KIND})?/{ID}\.git/info/lfs/objects/(?P<verb>batch)",
    r"/(v1/)?(?P<verb>cdn|lfs|xorbs|shards|reconstructions)(/default)?(/(?P<rest>\w+).*)?",
]
NEEDS = {"resolve": "files", "xet-read-token": "files", "preupload": "write", "commit": "write"}
NEEDS |= {"xet-write-token": "write", "settings": "write", "batch": "write"}


@dataclass
class Fault:
    """What befalls the next `times` requests that match, after `skip` others."""

    method: str
    path: str
    times: int = 1  # -1: every one
    skip: int = 0
    status: int = 0  # answered, with `headers` and `body`, in place of the handler's answer
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None  # bytes of the body sent before the connection is closed
    flip: int | None = None  # byte of the body whose lowest bit is inverted
    rate: int = 1 << 40  # bytes of the body per second
    delay: float = 0.0  # seconds before anything is done
    call: Callable[[], object] = bool  # runs before the request is handled
    close: bool = False  # closes the connection: nothing done, nothing answered
    lose: bool = False  # does what is asked, then closes the connection without an answer


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    token: str | None = None  # the first 8 hexadecimal digits of its sha256
    status: int = 0  # 0: closed without an answer
    sent: int = 0  # bytes of the body


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    hub: "Hub"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that went away
            super().handle_error(request, client_address)


class Hub(Storage):
    """The repositories, the faults and the log, and two listeners on 127.0.0.1."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(folder)
        self.tokens: dict[str, list[str]] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.page, self.ports = 1000, [port, 0]  # rows of a listing's page
        self.servers: list[Server] = []

    def __enter__(self) -> "Hub":
        """Listen; after `stop`, on the same ports again."""
        self.servers = [Server(("127.0.0.1", port), Handler) for port in self.ports]
        self.ports = [server.server_port for server in self.servers]
        self.url, self.storage = (f"http://127.0.0.1:{port}" for port in self.ports)
        for server in self.servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self, *_: object) -> None:
        """From now on connections are refused; open ones are closed at their next request."""
        servers, self.servers = self.servers, []
        for server in servers:
            server.shutdown()
            server.server_close()

    __exit__ = stop

    def env(self, home: Path, token: str = "", *, xet: bool = False) -> dict[str, str]:
        """The environment of a process that talks to this hub, with an HF_HOME of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token}
        return kept | {"HF_HUB_DISABLE_XET": "0" if xet else "1"}

    def fault(self, method: str = "", path: str = "", **kinds: Any) -> Fault:
        """Add a rule; regular expressions for the method and the path with its query, searched."""
        self.faults.append(Fault(method, path, **kinds))
        return self.faults[-1]

    def requests(self, method: str = "", path: str = "") -> list[Request]:
        return [r for r in self.log if re.search(method, r.method) and re.search(path, r.path)]

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.log)

    def next_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            for rule in self.faults:
                if rule.times and re.search(rule.method, method) and re.search(rule.path, path):
                    rule.skip, ready = rule.skip - 1, rule.skip <= 0
                    rule.times -= ready
                    if ready:
                        return rule
        return Fault("", "")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def serve(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub, self.status, self.extra = self.server.hub, 200, dict[str, str]()
        self.own, fault = OWN in token + self.path, Fault("", "")
        self.line = Request(self.command, self.path, self.headers.get("Range"))
        if not self.own:  # neither logged nor disturbed: the hub's reading of what Xet brought
            self.line.token = hashlib.sha256(token.encode()).hexdigest()[:8] if token else None
            self.hub.log.append(self.line)
            fault = self.hub.next_fault(self.command, self.path)
        time.sleep(fault.delay)
        fault.call()
        if fault.close or not self.hub.servers:
            return self.hang_up()
        self.body, self.names = self.read_body(), self.hub.tokens.get(token, [])
        try:
            if token not in ("", XET, OWN, *self.hub.tokens):
                raise Refusal(401, "Invalid credentials in Authorization header")
            answer = fault.body if fault.status else self.route()
        except Refusal as error:
            self.status, answer = error.status, {"error": error.message}
            self.extra |= {"X-Error-Message": error.message}
            self.extra |= {"X-Error-Code": error.code} if error.code else {}
        if fault.lose:
            return self.hang_up()
        self.extra |= fault.headers
        return self.send(fault.status or self.status, answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def read(self, size: int) -> bytes:
        if len(data := self.rfile.read(size)) < size:
            raise ConnectionError("the client went away in the middle of its request")
        return data

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline() or b"1", 16):
            body += self.read(size + 2)[:-2]
        self.rfile.readline()
        return body

    def send(self, status: int, answer: Any, fault: Fault) -> None:
        if isinstance(answer, dict | list):
            answer = json.dumps(answer, default=str).encode()
        with answer.open("rb") if isinstance(answer, Path) else io.BytesIO(answer) as file:
            start, end = 0, (size := file.seek(0, os.SEEK_END))
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked and isinstance(answer, Path):
                start, end = int(asked[1]), min(size, int(asked[2] or size) + 1)
                status = 206 if start < size else 416
                self.extra["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            self.line.status, left = status, max(end - start, 0)
            self.send_response_only(status)
            for name, value in {"Content-Length": str(left), **self.extra}.items():
                self.send_header(name, value)
            self.end_headers()
            file.seek(start)
            if self.command != "HEAD":
                self.send_body(file, left, fault)

    def send_body(self, file: IO[bytes], left: int, fault: Fault) -> None:
        line, step = self.line, min(1 << 18, max(fault.rate // 10, 1))
        until = left if fault.cut is None else min(fault.cut, left)
        while block := bytearray(file.read(min(until - line.sent, step))):
            if fault.flip is not None and 0 <= fault.flip - line.sent < len(block):
                block[fault.flip - line.sent] ^= 1
            self.wfile.write(block)
            line.sent += len(block)
            time.sleep(len(block) / fault.rate)
        if line.sent < left:
            self.hang_up()

    def route(self) -> Any:
        """The handler's answer: GET /api/models/owner/name/tree/main is that of `get_tree`."""
        url, method = urlsplit(self.path), self.command.replace("HEAD", "GET").lower()
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        found = next((m for route in ROUTES if (m := re.fullmatch(route, url.path))), None)
        part = {k: unquote(v) for k, v in found.groupdict().items() if v} if found else {}
        verb = part.get("verb", "revision")
        self.kind, self.id = part.get("kind", "models").removesuffix("s"), part.get("id", "")
        self.revision, self.rest = part.get("revision", "main"), part.get("rest", "")
        if self.id:
            self.repo = self.hub.access(self.kind, self.id, self.names, NEEDS.get(verb, "read"))
            self.commit = self.repo.at(self.revision)
        if not found or not (handler := getattr(self, f"{method}_{verb.replace('-', '_')}", None)):
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        return handler()

    def page(self) -> str:
        return f"{self.hub.url}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"

    def get_whoami_v2(self) -> Any:
        if not self.names:
            raise Refusal(401, "Invalid username or password.")
        role = {"displayName": "test", "role": "read" if READ_ONLY in self.names else "write"}
        orgs = [{"type": "org", "name": name} for name in self.names[1:]]
        return {"name": self.names[0], "orgs": orgs, "auth": {"accessToken": role}}

    def post_validate_yaml(self) -> Any:
        try:
            found = card(json.loads(self.body)["content"])
        except (yaml.YAMLError, ValueError) as error:
            self.status = 400
            return {"errors": [{"message": str(error)}], "warnings": []}
        empty = [] if found else [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": empty}

    def named(self) -> dict[str, Any]:
        """Set kind and id of the repository that is to be created or deleted."""
        asked: dict[str, Any] = json.loads(self.body)
        owner = asked.get("organization") or (self.names or [""])[0]
        self.kind, self.id = asked.get("type") or "model", f"{owner}/{asked['name']}"
        return asked

    def post_create(self) -> Any:
        asked = self.named()
        if READ_ONLY in self.names or self.id.split("/")[0] not in self.names:
            text = "You don't have the rights to create a repository under this namespace"
            raise Refusal(403 if self.names else 401, text)
        if (self.kind, self.id) in self.hub.repos:
            self.status = 409
            return {"error": f"You already created this {self.kind} repo", "url": self.page()}
        self.hub.commit(self.kind, self.id, {".gitattributes": ATTRIBUTES}, "initial commit")
        self.hub.repos[self.kind, self.id].private = asked.get("visibility") == "private"
        return {"url": self.page(), "name": self.id, "id": self.id}

    def delete_delete(self) -> Any:
        self.named()
        self.hub.access(self.kind, self.id, self.names, "write")
        return self.hub.repos.pop((self.kind, self.id)) and b""

    def put_settings(self) -> Any:
        asked = json.loads(self.body)
        self.repo.gated = asked.get("gated", self.repo.gated)
        if visibility := asked.get("visibility"):
            self.repo.private = visibility == "private"
        return asked

    def get_revision(self) -> Any:
        expand = parse_qs(urlsplit(self.path).query).get("expand")
        return self.repo.info(self.id, self.commit, expand, blobs="blobs" in self.query)

    def listed(self, rows: list[Any]) -> list[Any]:
        """A page of rows, and in Link where the next one is."""
        start = int(self.query.get("cursor", "0"))
        if (end := start + self.hub.page) < len(rows):
            query = urlencode(self.query | {"cursor": end})
            self.extra["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{query}>; rel="next"'
        return rows[start:end]

    def get_tree(self) -> Any:
        deep = self.query.get("recursive", "false").lower() in ("true", "1")
        return self.listed(self.commit.below(self.rest, deep))

    def post_paths_info(self) -> Any:
        rows = self.commit.entries()
        return [rows[p] for p in parse_qs(self.body.decode()).get("paths", []) if p in rows]

    def get_refs(self) -> Any:
        return self.repo.branches_and_tags()

    def get_commits(self) -> Any:
        return self.listed(self.repo.history(self.id, self.commit))

    def post_preupload(self) -> Any:
        return {"files": self.commit.upload_modes(json.loads(self.body)["files"])}

    def post_batch(self) -> Any:
        rows = []
        for row in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.storage}/lfs/{row['oid']}", "header": {}}}
            rows.append(row | ({} if row["oid"] in self.hub.lfs else {"actions": upload}))
        return {"transfer": "basic", "objects": rows}

    def post_commit(self) -> Any:
        rows = [json.loads(line) for line in self.body.splitlines()]
        made = self.hub.apply(self.kind, self.id, self.revision, rows)
        return {"success": True, "commitOid": made, "commitUrl": f"{self.page()}/commit/{made}"}

    def get_resolve(self) -> Any:
        self.extra |= {"X-Repo-Commit": self.commit.id, "Accept-Ranges": "bytes"}
        if not (blob := self.commit.files.get(self.rest)):
            raise Refusal(404, "Entry not found", "EntryNotFound")
        if not blob.lfs:
            self.extra["ETag"] = f'"{blob.oid}"'
            return blob.path
        place = f"{self.hub.storage}/cdn/{blob.sha256}/{quote(self.rest)}"
        self.extra |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        self.extra["Location"], self.status = place, 302
        if blob.xet:
            route = f"{self.hub.url}/api/{self.kind}s/{self.id}/xet-read-token/{self.commit.id}"
            self.extra |= {"X-Xet-Hash": blob.xet, "Link": f'<{route}>; rel="xet-auth"'}
        return b""

    def get_xet_read_token(self) -> Any:
        url, end = self.hub.storage, int(time.time()) + 3600
        self.extra |= {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": XET}
        self.extra |= {"X-Xet-Token-Expiration": str(end)}
        return {"casUrl": url, "accessToken": XET, "exp": end}

    get_xet_write_token = get_xet_read_token

    def get_cdn(self) -> Any:
        return self.hub.lfs[self.rest].path

    def put_lfs(self) -> Any:
        if hashlib.sha256(self.body).hexdigest() != self.rest:
            raise Refusal(400, "The body does not have the sha256 of its address")
        self.hub.blob(".bin", self.body)
        return b""

    def post_xorbs(self) -> Any:
        (self.hub.objects / self.rest).write_bytes(self.body)
        return {"was_inserted": True}

    def get_xorbs(self) -> Any:
        return self.hub.objects / self.rest

    def post_shards(self) -> Any:
        self.hub.register(self.body, self.hub.storage)
        return {"result": 1}

    def get_reconstructions(self) -> Any:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = (int(asked[1]), int(asked[2] or 1 << 62)) if asked else (0, 1 << 62)
        suffix = f"?{OWN}" if self.own else ""
        return self.hub.reconstruction(self.rest, start, end, self.hub.storage, suffix)


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hugging Face hub on loopback.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    with Hub(options.folder, options.port) as hub:
        os.write(sys.stdout.fileno(), f"{hub.url}\n".encode())
        threading.Event().wait()


if __name__ == "__main__":
    main()
