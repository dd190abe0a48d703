"""A local server that stands in for the Hugging Face hub.

It answers the few requests that loading a data set, a tokenizer or a model
makes, in the hub's format, so that the libraries run their own code. `root`
holds `datasets/OWNER/NAME/...` and `models/NAME/...`.
"""

import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse

COMMIT = "0" * 39 + "1"


class Hub(http.server.ThreadingHTTPServer):
  """Serves a folder on a free port until it is closed."""

  def __init__(self, root: pathlib.Path):
    super().__init__(("127.0.0.1", 0), Handler)
    self.root = root
    self.requests: list[str] = []  # "GET /path", in order
    self.gated: set[str] = set()
    self.down = False  # closes every connection without an answer
    threading.Thread(target=self.serve_forever, daemon=True).start()

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_port}"

  def close(self) -> None:
    self.shutdown()
    self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
  """Repository, tree and file requests, with ranges."""

  server: Hub
  protocol_version = "HTTP/1.1"

  def log_message(self, *_: object) -> None:
    pass

  def do_HEAD(self) -> None:
    self.answer()

  def do_GET(self) -> None:
    self.answer()

  def do_POST(self) -> None:
    self.answer()

  def answer(self) -> None:
    if self.server.down:
      self.close_connection = True
      return
    url = urllib.parse.urlparse(self.path)
    path = urllib.parse.unquote(url.path)
    self.server.requests.append(f"{self.command} {path}")
    size = int(self.headers.get("Content-Length") or 0)
    body = self.rfile.read(size)
    api = re.fullmatch(
      r"/api/(datasets|models)/(.+?)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?",
      path,
    )
    file = re.fullmatch(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)", path)
    if api:
      kind, name, what, _, rest = api.groups()
      self.repository(kind, name, what, rest or "", body)
    elif file:
      kind = "datasets" if file[1] else "models"
      self.file(kind, file[2], file[4])
    else:
      self.error(404, "EntryNotFound")

  def folder(self, kind: str, name: str) -> pathlib.Path | None:
    found = self.server.root / kind / name
    if name in self.server.gated:
      self.error(403, "GatedRepo")
    elif not found.is_dir():
      self.error(401, "RepoNotFound")
    else:
      return found
    return None

  def repository(
    self, kind: str, name: str, what: str | None, rest: str, body: bytes
  ) -> None:
    root = self.folder(kind, name)
    if root is None:
      return
    files = sorted(p for p in root.rglob("*") if p.is_file())
    if what == "tree":
      base = root / rest
      if not base.is_dir():
        self.error(404, "EntryNotFound")
        return
      self.json([self.entry(root, p) for p in sorted(base.iterdir())])
    elif what == "paths-info":
      fields = urllib.parse.parse_qs(body.decode())
      asked = fields.get("paths") or json.loads(body or b"{}").get("paths", [])
      self.json(
        [self.entry(root, root / p) for p in asked if (root / p).exists()]
      )
    else:
      names = [{"rfilename": str(p.relative_to(root))} for p in files]
      self.json(
        {
          "id": name,
          "_id": "1",
          "sha": COMMIT,
          "private": False,
          "gated": False,
          "disabled": False,
          "downloads": 0,
          "likes": 0,
          "tags": [],
          "lastModified": "2024-01-01T00:00:00.000Z",
          "siblings": names,
        }
      )

  def entry(self, root: pathlib.Path, path: pathlib.Path) -> dict:
    name = str(path.relative_to(root))
    if path.is_dir():
      return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    return {
      "type": "file",
      "oid": etag(path),
      "size": path.stat().st_size,
      "path": name,
    }

  def file(self, kind: str, name: str, inner: str) -> None:
    root = self.folder(kind, name)
    if root is None:
      return
    path = root / inner
    if not path.is_file():
      self.error(404, "EntryNotFound")
      return
    content = path.read_bytes()
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
    code, headers = (
      200,
      {
        "ETag": f'"{etag(path)}"',
        "X-Repo-Commit": COMMIT,
        "Accept-Ranges": "bytes",
      },
    )
    if wanted:
      start = int(wanted[1])
      stop = min(int(wanted[2] or len(content)), len(content) - 1)
      headers["Content-Range"] = f"bytes {start}-{stop}/{len(content)}"
      content, code = content[start : stop + 1], 206
    self.reply(code, content, headers)

  def json(self, value: object) -> None:
    self.reply(
      200, json.dumps(value).encode(), {"Content-Type": "application/json"}
    )

  def error(self, code: int, name: str) -> None:
    self.reply(code, b"{}", {"X-Error-Code": name, "X-Error-Message": name})

  def reply(self, code: int, content: bytes, headers: dict[str, str]) -> None:
    self.send_response(code)
    for key, value in headers.items():
      self.send_header(key, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(content)


def etag(path: pathlib.Path) -> str:
  return hashlib.sha1(path.read_bytes()).hexdigest()
