"""A Hub on this machine: as much of the protocol as the real client speaks when it publishes and loads a model.

It keeps commits in memory, takes large files through git-LFS, reads the cards as the Hub does, and breaks on demand.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from operator import itemgetter
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKENS = {"hf_writer": "me", "hf_reader": "reader"}  # the second may write nowhere
LARGE = (".safetensors", ".png", ".bin")
FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass
class Fault:
    """What goes wrong at a request: the connection dies half-way through the upload, or a status is answered."""

    method: str
    path: str
    times: int = 1
    status: int | None = None
    message: str = ""


@dataclass
class Repo:
    """Branches to commits; a commit is path to (bytes, is it in LFS)."""

    private: bool = False
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, tuple[bytes, bool]], message: str, ref: str) -> str:
        told = json.dumps([len(self.messages), message, sorted(files)])
        sha = hashlib.sha1(told.encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class Hub:
    """State of the server, and what a test looks at: repositories, objects, requests, faults."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}  # "owner/name" of a model, "datasets/owner/name" of a data set
        self.collections: dict[str, dict] = {}  # by slug
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.corrupt: str | None = None  # a file that is served with one byte changed
        self.url = ""
        self.storage = ""  # another host, as for large files of the Hub: the client does not look for a commit there

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return {name: content for name, (content, _) in found.commits[found.resolve(revision)].items()}

    def count(self, method: str, path: str) -> int:
        return sum(got == method and path in where for got, where in self.requests)

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and fault.path in path:
                fault.times -= 1
                return fault
        return None

    def info(self, name: str, sha: str) -> dict:
        repo = self.repos[name]
        card = metadata(repo.commits[sha].get("README.md", (b"", False))[0])
        tags = [*card.get("tags", []), card.get("library_name"), card.get("pipeline_tag")]
        tags += [f"license:{card['license']}"] if "license" in card else []
        if base := card.get("base_model"):
            tags += [f"base_model:{base}", f"base_model:{card.get('base_model_relation')}:{base}"]
        return {
            "id": name.removeprefix("datasets/"), "modelId": name, "sha": sha, "private": repo.private, "downloads": 0, "likes": 0,
            "tags": [tag for tag in tags if tag], "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"), "cardData": card, "model-index": card.get("model-index"),
            "siblings": [{"rfilename": path} for path in sorted(repo.commits[sha])],
            "evalResults": evaluations(repo.commits[sha]),
        }  # fmt: skip


def evaluations(files: dict[str, tuple[bytes, bool]]) -> list[dict]:
    """What `.eval_results/*.yaml` say, entry by entry; of a file that the Hub does not take, why."""
    found = []
    for path, (content, _) in sorted(files.items()):
        if re.fullmatch(r"\.eval_results/[^/]+\.yaml", path):
            for entry in yaml.safe_load(content):
                dataset = entry.get("dataset", {})
                whole = "/" in str(dataset.get("id")) and dataset.get("task_id") and "value" in entry
                strange = set(entry) - {"dataset", "value", "verifyToken", "date", "source", "notes"}
                bad = {"error": "schema"} if strange or not whole else {"data": entry}
                found.append({"filename": path, **bad})
    return found


def metadata(card: bytes) -> dict:
    """The YAML head of a card; raises ValueError where the Hub would refuse it."""
    match = FRONT.search(card.decode())
    data = (yaml.safe_load(match[1]) if match else None) or {}
    for entry in data.get("model-index", []):
        for result in entry["results"] if entry.get("name") else [{}]:
            if not result.get("task", {}).get("type") or not {"type", "name"} <= set(result.get("dataset", {})):
                raise ValueError("model-index: a result needs task.type, dataset.type and dataset.name")
            if not result.get("metrics") or not all({"type", "value"} <= set(row) for row in result["metrics"]):
                raise ValueError("model-index: a metric needs type and value")
    for base in [data["base_model"]] if data.get("base_model") else []:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            raise ValueError(f'"base_model" with value {base!r} is not valid. Use a model id from the Hub')
    return data


def owner_of(name: str) -> str:
    return name.split("/")[-2]


def folder_row(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": "0" * 40}


def tree_row(path: str, file: tuple[bytes, bool]) -> dict:
    content, large = file
    row = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
    if large:
        row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return row


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        place = urlsplit(self.path)
        path, self.query = (
            unquote(place.path).replace("/api/datasets/", "/api/models/datasets/"),
            parse_qs(place.query),
        )
        self.hub.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        if fault := self.hub.fault(self.command, path):
            if fault.status is None:  # half of the upload, and the line is dead
                self.rfile.read(length // 2)
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.rfile.read(length)
            self.answer({"error": fault.message}, fault.status)
            return
        self.body = self.rfile.read(length)
        self.user = TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, path):
                method(self, *match.groups())
                return
        self.answer({"error": f"no route {self.command} {path}"}, 404)

    def answer(self, content, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def may_write(self, owner: str) -> bool:
        if self.user == owner:
            return True
        if self.user is None:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        else:
            self.refuse(403, "", f"You don't have the rights to write to {owner}")
        return False

    def readable(self, name: str, revision: str = "main") -> str | None:
        """The commit that is asked for, or None after the refusal was sent."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.user != owner_of(name)):
            self.refuse(404 if self.user else 401, "RepoNotFound", "Repository not found")
            return None
        if (sha := repo.resolve(revision)) is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # The routes

    def whoami(self) -> None:
        if self.user is None:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        else:
            self.answer({"type": "user", "name": self.user, "orgs": []})

    def create(self) -> None:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.user or ""
        name = f"{'datasets/' if wanted.get('type') == 'dataset' else ''}{owner}/{wanted['name']}"
        if not self.may_write(owner):
            return
        if name in self.hub.repos:
            self.answer({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            return
        repo = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        repo.commit({".gitattributes": (b"*.safetensors filter=lfs\n", False)}, "initial commit", "main")
        self.hub.repos[name] = repo
        self.answer({"url": f"{self.hub.url}/{name}"})

    def validate(self) -> None:
        try:
            metadata(json.loads(self.body)["content"].encode())
            self.answer({"errors": [], "warnings": []})
        except (ValueError, yaml.YAMLError) as error:
            self.answer({"errors": [{"message": str(error)}], "warnings": []}, 400)

    def collect(self) -> None:
        wanted = json.loads(self.body)
        slug = f"{wanted['namespace']}/{re.sub(r'[^a-z0-9]+', '-', wanted['title'].lower())}-65f0"
        if not self.may_write(wanted["namespace"]):
            return
        if slug in self.hub.collections:
            self.answer({"error": "already exists", "slug": slug}, 409)
            return
        about = {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "theme": "green", "upvotes": 0}
        self.hub.collections[slug] = {
            "slug": slug, "title": wanted["title"], "owner": {"name": wanted["namespace"]},
            "private": wanted["private"], "items": [], **about,
        }  # fmt: skip
        self.answer(self.hub.collections[slug])

    def collection(self, slug: str) -> None:
        self.answer(self.hub.collections[slug])

    def add_item(self, slug: str) -> None:
        wanted, items = json.loads(self.body), self.hub.collections[slug]["items"]
        if not self.may_write(slug.split("/")[0]):
            return
        if any(item["id"] == wanted["item"]["id"] for item in items):
            self.answer({"error": "already there"}, 409)
            return
        items.append(
            {"_id": str(len(items)), "position": len(items), "note": {"text": wanted.get("note")}, **wanted["item"]}
        )
        self.answer(self.hub.collections[slug])

    def listing(self) -> None:
        shown = [(name, repo) for name, repo in self.hub.repos.items() if not repo.private and name.count("/") == 1]
        infos = [self.hub.info(name, repo.refs["main"]) for name, repo in shown]
        wanted = set(self.query.get("filter", []))
        self.answer([info for info in infos if wanted <= set(info["tags"])])

    def info(self, name: str, revision: str | None = None) -> None:
        if sha := self.readable(name, revision or "main"):
            self.answer(self.hub.info(name, sha))

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        if sha := self.readable(name, revision):
            files = self.hub.repos[name].commits[sha]
            above = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
            rows = [tree_row(path, files[path]) for path in files] + [folder_row(path) for path in above]
            found = [row for row in rows if row["path"].startswith(f"{folder}/" if folder else "")]
            if self.query.get("recursive") != ["true"]:
                found = [row for row in found if "/" not in row["path"][len(folder) + 1 :]]
            self.answer(sorted(found, key=itemgetter("path")))

    def paths_info(self, name: str, revision: str) -> None:
        if sha := self.readable(name, revision):
            files, rows = self.hub.repos[name].commits[sha], []
            for path in json.loads(self.body)["paths"]:
                if path in files:
                    rows.append(tree_row(path, files[path]))
                elif any(file.startswith(f"{path}/") for file in files):
                    rows.append(folder_row(path))
            self.answer(rows)

    def branch(self, name: str, branch: str) -> None:
        if self.may_write(owner_of(name)) and (sha := self.readable(name)):
            refs = self.hub.repos[name].refs
            if branch in refs:
                self.answer({"error": "Reference already exists"}, 409)
            else:
                refs[branch] = sha
                self.answer({})

    def preupload(self, name: str, revision: str) -> None:
        if self.may_write(owner_of(name)) and (sha := self.readable(name, revision)):
            present = self.hub.repos[name].commits[sha]
            rows = []
            for file in json.loads(self.body)["files"]:
                row = {"path": file["path"], "shouldIgnore": False}
                row["uploadMode"] = "lfs" if file["path"].endswith(LARGE) else "regular"
                if file["path"] in present:
                    content, large = present[file["path"]]
                    row["oid"] = hashlib.sha256(content).hexdigest() if large else blob_id(content)
                rows.append(row)
            self.answer({"files": rows})

    def batch(self, name: str) -> None:
        if self.may_write(owner_of(name)):
            rows = []
            for item in json.loads(self.body)["objects"]:
                row = {"oid": item["oid"], "size": item["size"]}
                if item["oid"] not in self.hub.objects:
                    row["actions"] = {"upload": {"href": f"{self.hub.storage}/lfs/{item['oid']}"}}
                rows.append(row)
            self.answer({"transfer": "basic", "objects": rows})

    def lfs(self, oid: str) -> None:
        if self.command != "PUT":
            self.answer(self.hub.objects[oid], ETag=f'"{oid}"')
        elif hashlib.sha256(self.body).hexdigest() != oid:
            self.answer({"error": "sha256 mismatch"}, 400)
        else:
            self.hub.objects[oid] = self.body
            self.answer(b"")

    def commit(self, name: str, revision: str) -> None:
        if not self.may_write(owner_of(name)) or (parent := self.readable(name, revision)) is None:
            return
        repo = self.hub.repos[name]
        files, message = dict(repo.commits[parent]), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"]), False
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]], True
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        request = f"refs/pr/{len(repo.refs)}" if self.query.get("create_pr") else None
        sha = repo.commit(files, message, request or revision)
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha}
        if request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{request.rsplit('/', 1)[1]}"
        self.answer(answer)

    def resolve(self, name: str, revision: str, path: str) -> None:
        if (sha := self.readable(name, revision)) is None:
            return
        content, large = self.hub.repos[name].commits[sha].get(path, (None, False))
        if content is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif path == self.hub.corrupt:
            self.answer(content[:-2] + b"?" + content[-1:], X_Repo_Commit=sha, ETag='"changed"')
        elif large:
            oid = hashlib.sha256(content).hexdigest()
            linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(content))}
            self.answer(b"", 302, Location=f"{self.hub.storage}/lfs/{oid}", X_Repo_Commit=sha, **linked)
        else:
            self.answer(content, X_Repo_Commit=sha, ETag=f'"{blob_id(content)}"')


NAME = r"((?:datasets/)?[\w.-]+/[\w.-]+)"
ROUTES = [
    (r"/api/whoami-v2", Handler.whoami),
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.validate),
    (r"/api/models", Handler.listing),
    (r"/api/collections", Handler.collect),
    (r"/api/collections/([\w./-]+)/items", Handler.add_item),
    (r"/api/collections/([\w./-]+)", Handler.collection),
    (rf"/api/models/{NAME}", Handler.info),
    (rf"/api/models/{NAME}/revision/(.+)", Handler.info),
    (rf"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    (rf"/api/models/{NAME}/tree/([^/]+)/(.+)", Handler.tree),
    (rf"/api/models/{NAME}/paths-info/([^/]+)", Handler.paths_info),
    (rf"/api/models/{NAME}/branch/(.+)", Handler.branch),
    (rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"/lfs/(\w+)", Handler.lfs),
    (rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def running_hub():
    """A hub on a free port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url, hub.storage = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
