"""A stand-in for the Hugging Face Hub: its HTTP protocol as far as huggingface_hub needs it.

Repositories with one branch; files are stored in Git, large ones (safetensors) by the LFS protocol.
What is sent and asked for is counted.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

WRITES = {"name": "someone", "orgs": [{"name": "team", "roleInOrg": "write"}], "role": "write"}
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


@dataclass
class Hub:
    """What the server holds; `user` is whose token it accepts (None: no token is valid)."""

    url: str = ""
    user: Mapping[str, Any] | None = field(default_factory=lambda: WRITES)
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by SHA-256
    sent: Counter[str] = field(default_factory=Counter)  # how often each of them came
    got: Counter[str] = field(default_factory=Counter)  # files, by their paths
    uploads: int | None = None  # how many more objects are accepted

    def validated(self, text: str) -> list[str]:
        """What the Hub finds wrong with the metadata of a card."""
        metadata = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---") else {}
        bases = metadata.get("base_model") or []
        bases = [bases] if isinstance(bases, str) else bases
        return [
            f'"base_model" with value {b} is not valid' for b in bases if not _NAME.fullmatch(b)
        ]


def _oid(content: bytes, lfs: bool) -> str:
    if lfs:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, code: int, content: Any = b"", **headers: str) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def refuse(self, code: int, kind: str) -> None:
            self.answer(code, {"error": kind}, X_Error_Code=kind, X_Error_Message=kind)

        def repository(self, name: str) -> Repository | None:
            found = hub.repositories.get(name)
            if found is None or (found.private and hub.user is None):
                self.refuse(404, "RepoNotFound")
                return None
            return found

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            if path == "api/whoami-v2":
                if hub.user is None or not self.headers.get("Authorization"):
                    return self.refuse(401, "Unauthorized")
                token = {"accessToken": {"role": hub.user["role"]}}
                return self.answer(200, {**hub.user, "type": "user", "auth": token})
            if match := re.fullmatch(rf"api/models/({_NAME.pattern})(/revision/\w+)?", path):
                if repository := self.repository(match[1]):
                    about = {"id": match[1], "private": repository.private, "sha": repository.sha}
                    files = [{"rfilename": name} for name in repository.files]
                    self.answer(200, {**about, "siblings": files, "tags": [], "downloads": 0})
                return None
            if match := re.fullmatch(rf"api/models/({_NAME.pattern})/tree/\w+", path):
                if repository := self.repository(match[1]):
                    self.answer(200, [self.entry(*item) for item in repository.files.items()])
                return None
            match = re.fullmatch(rf"({_NAME.pattern})/resolve/(\w+)/(.+)", path)
            repository = self.repository(match[1]) if match else None
            if match is None or repository is None:
                return self.refuse(404, "NotFound") if match is None else None
            if (content := repository.files.get(match[3])) is None:
                return self.refuse(404, "EntryNotFound")
            if self.command == "GET":
                hub.got[match[3]] += 1
            etag = f'"{_oid(content, _is_large(match[3]))}"'
            return self.answer(200, content, ETag=etag, X_Repo_Commit=repository.sha)

        do_HEAD = do_GET  # noqa: N815

        def entry(self, path: str, content: bytes) -> dict[str, Any]:
            size, oid = len(content), _oid(content, _is_large(path))
            lfs = {"lfs": {"oid": oid, "size": size, "pointerSize": 100}} if _is_large(path) else {}
            return {"type": "file", "path": path, "size": size, "oid": oid, **lfs}

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if path == "api/repos/create":
                given = json.loads(body)
                name = f"{given.get('organization') or hub.user['name']}/{given['name']}"
                known, url = name in hub.repositories, {"url": f"{hub.url}/{name}"}
                private = given.get("private", given.get("visibility") == "private")
                hub.repositories.setdefault(name, Repository(private))
                return self.answer(409 if known else 200, url)
            if path == "api/validate-yaml":
                wrong = hub.validated(json.loads(body)["content"])
                errors = [{"message": message} for message in wrong]
                return self.answer(400 if wrong else 200, {"errors": errors, "warnings": []})
            if match := re.fullmatch(rf"api/models/({_NAME.pattern})/preupload/\w+", path):
                known = hub.repositories[match[1]].files
                return self.answer(
                    200,
                    {
                        "files": [
                            {
                                "path": file["path"],
                                "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                                "shouldIgnore": False,
                                "oid": _oid(known[file["path"]], _is_large(file["path"]))
                                if file["path"] in known
                                else None,
                            }
                            for file in json.loads(body)["files"]
                        ]
                    },
                )
            if re.fullmatch(rf"({_NAME.pattern})\.git/info/lfs/objects/batch", path):
                answers = []
                for wanted in json.loads(body)["objects"]:
                    where = {"upload": {"href": f"{hub.url}/objects/{wanted['oid']}"}}
                    known = wanted["oid"] in hub.objects
                    answers.append(wanted if known else {**wanted, "actions": where})
                return self.answer(200, {"transfer": "basic", "objects": answers})
            match = re.fullmatch(rf"api/models/({_NAME.pattern})/commit/\w+", path)
            assert match is not None, path
            repository = hub.repositories[match[1]]
            for line in body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    repository.files[value["path"]] = hub.objects[value["oid"]]
                elif item["key"] == "deletedFile":
                    del repository.files[value["path"]]
            repository.commits += 1
            url = f"{hub.url}/{match[1]}/commit/{repository.sha}"
            return self.answer(200, {"commitUrl": url, "commitOid": repository.sha})

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if hub.uploads == 0:
                return self.refuse(403, "Stopped")
            if hub.uploads is not None:
                hub.uploads -= 1
            oid = self.path.rpartition("/")[2]
            assert _oid(content, True) == oid
            hub.objects[oid] = content
            hub.sent[oid] += 1
            return self.answer(200)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
