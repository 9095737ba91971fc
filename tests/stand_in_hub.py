"""A Hugging Face hub in miniature on 127.0.0.1.

It holds what `source="hub"` asks for: under the real model's name a tiny random DistilBERT with the
real tokenizer, under the real dataset's name a few real reviews, in the hub's file layout. Each has
two commits, `main` and `earlier`, that differ, so that one can see which of them was handed out.
What the server answers is what `transformers` and `datasets` were seen to ask.
"""

import hashlib
import io
import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import datasets
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from support.imdb import HUB_DATASET, load_imdb
from support.model import HUB_MODEL, load_tokenizer

COMMITS = {"main": "a" * 40, "earlier": "b" * 40}
MODEL_SEED = {"main": 0, "earlier": 1}
DTYPE = {"main": torch.float32, "earlier": torch.float16}
ROWS_PER_CLASS = {"main": 40, "earlier": 30}

DATASET_CARD = """---
configs:
- config_name: plain_text
  default: true
  data_files:
  - {split: train, path: plain_text/train-*}
  - {split: test, path: plain_text/test-*}
  - {split: unsupervised, path: plain_text/unsupervised-*}
---
"""

Files = dict[str, bytes]
"""Contents of a repository at one commit, by path."""


def tiny_distilbert(seed: int) -> DistilBertForSequenceClassification:
    """Six layers like the real one, width 16, random weights."""
    torch.manual_seed(seed)
    config = DistilBertConfig(dim=16, hidden_dim=32, n_layers=6, n_heads=2, initializer_range=0.2)
    return DistilBertForSequenceClassification(config).eval()


def first_of_each_class(reviews: datasets.Dataset, rows: int) -> datasets.Dataset:
    """The first `rows` negative reviews, then the first `rows` positive ones."""
    labels = list(reviews["label"])
    starts = labels.index(0), labels.index(1)
    return reviews.select([start + row for start in starts for row in range(rows)])


def model_files(revision: str) -> Files:
    """The model's repository, as `save_pretrained` lays it out."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_distilbert(MODEL_SEED[revision]).to(DTYPE[revision]).save_pretrained(folder)
        load_tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def dataset_files(revision: str) -> Files:
    """The dataset's repository: a card and one parquet file per split."""
    files = {"README.md": DATASET_CARD.encode()}
    imdb = {
        split: first_of_each_class(reviews, ROWS_PER_CLASS[revision])
        for split, reviews in load_imdb().items()
    }
    unlabelled = [{"text": "A review without a label.", "label": -1}]
    imdb["unsupervised"] = datasets.Dataset.from_list(unlabelled, features=imdb["train"].features)
    for split, reviews in imdb.items():
        parquet = io.BytesIO()
        reviews.to_parquet(parquet)
        files[f"plain_text/{split}-00000-of-00001.parquet"] = parquet.getvalue()
    return files


class StandInHub(ThreadingHTTPServer):
    """The server; `requests` holds method and path of everything it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), RequestHandler)
        self.repositories = {
            f"models/{HUB_MODEL}": {revision: model_files(revision) for revision in COMMITS},
            f"datasets/{HUB_DATASET}": {revision: dataset_files(revision) for revision in COMMITS},
        }
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[StandInHub]:
    """A hub that serves from a thread until the block ends."""
    with StandInHub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class RequestHandler(BaseHTTPRequestHandler):
    """Three routes: what a repository is, which files it has, and one of them."""

    protocol_version = "HTTP/1.1"
    server: StandInHub

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            self._answer_api(parts[1:])
        else:
            self._answer_file(parts if parts[0] == "datasets" else ["models", *parts])

    do_HEAD = do_GET  # noqa: N815 (the name that http.server calls)

    def _answer_api(self, parts: list[str]) -> None:
        """`/api/{kind}/{owner}/{name}[/{question}/{revision}[/{path}]]`."""
        name, (question, revision, *path) = "/".join(parts[:3]), parts[3:] or ["revision", "main"]
        found = self._at_revision(name, revision)
        if found is None:
            return
        commit, files = found
        if question == "revision":
            siblings = [{"rfilename": file} for file in files]
            self._send_json({"id": "/".join(parts[1:3]), "sha": commit, "siblings": siblings})
        elif question == "tree" and (entries := _tree(files, "/".join(path))):
            self._send_json(entries)
        else:
            self._refuse("EntryNotFound")

    def _answer_file(self, parts: list[str]) -> None:
        """`/[datasets/]{owner}/{name}/resolve/{revision}/{file}`."""
        name, revision, file = "/".join(parts[:3]), parts[4], "/".join(parts[5:])
        found = self._at_revision(name, revision)
        if found is None:
            return
        commit, files = found
        if file not in files:
            self._refuse("EntryNotFound", {"X-Repo-Commit": commit})
            return
        headers = {"ETag": f'"{_oid(files[file])}"', "X-Repo-Commit": commit}
        self._send(200, files[file], headers)

    def _at_revision(self, name: str, revision: str) -> tuple[str, Files] | None:
        """Commit and files, or None after the refusal has been sent."""
        if name not in self.server.repositories:
            return self._refuse("RepoNotFound")
        for branch, commit in COMMITS.items():
            if revision in (branch, commit):
                return commit, self.server.repositories[name][branch]
        return self._refuse("RevisionNotFound")

    def _refuse(self, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(404, b"", {"X-Error-Code": code, **(headers or {})})

    def _send_json(self, answer: object) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silence: `StandInHub.requests` is the log."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _tree(files: Files, folder: str) -> list[dict[str, object]]:
    """Files under a folder, and the folders on the way: a listing may always say more than asked."""
    inside = [Path(file) for file in files if Path(folder) in Path(file).parents]
    folders = {parent for file in inside for parent in file.parents if Path(folder) in parent.parents}
    listed = [{"type": "directory", "path": str(path), "size": 0, "oid": ""} for path in folders]
    for path, content in ((str(file), files[str(file)]) for file in inside):
        listed.append({"type": "file", "path": path, "size": len(content), "oid": _oid(content)})
    return listed
