"""A Hugging Face hub in miniature on 127.0.0.1.

It holds what `source="hub"` asks for: under the real model's name a tiny random DistilBERT with the
real tokenizer, under the language model's a tiny Llama with the same, under the real dataset's name a few
real reviews, in the hub's file layout. Each has two commits, `main` and `earlier`, that differ, so that
one can see which of them was handed out. What the server answers is what `transformers` and `datasets`
were seen to ask.
"""

import hashlib
import io
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import datasets
import torch
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from support import language
from support.imdb import HUB_DATASET, load_imdb
from support.model import HUB_MODEL, load_tokenizer

COMMITS = {"main": "a" * 40, "earlier": "b" * 40}
REVISIONS = COMMITS | {commit: commit for commit in COMMITS.values()}
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


def tiny_llama(seed: int) -> LlamaForCausalLM:
    """Two blocks of width 8 that read the words of the real classifier's tokenizer, random weights."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30522, initializer_range=0.2, **sizes)).eval()


def first_of_each_class(reviews: datasets.Dataset, rows: int) -> datasets.Dataset:
    """The first `rows` negative reviews, then the first `rows` positive ones."""
    labels = list(reviews["label"])
    starts = labels.index(0), labels.index(1)
    return reviews.select([start + row for start in starts for row in range(rows)])


def model_files(revision: str, tiny: Callable[[int], PreTrainedModel] = tiny_distilbert) -> Files:
    """A model's repository, as `save_pretrained` lays it out."""
    with tempfile.TemporaryDirectory() as folder:
        tiny(MODEL_SEED[revision]).to(DTYPE[revision]).save_pretrained(folder)
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


def answers(kind: str, name: str, files: dict[str, Files]) -> dict[str, tuple[bytes, str]]:
    """What is asked of a repository, its files by commit: by path the answer, and the commit it is of."""
    found: dict[str, tuple[bytes, str]] = {}
    api, place = f"/api/{kind}/{name}", f"/{name}" if kind == "models" else f"/{kind}/{name}"
    for revision, commit in REVISIONS.items():
        kept = files[commit]
        about = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in kept]}
        found[f"{api}/revision/{revision}"] = json.dumps(about).encode(), commit
        for folder in {parent for file in kept for parent in Path(file).parents}:
            tree = "/".join([api, "tree", revision, *folder.parts])
            found[tree] = json.dumps(_listed(kept, folder)).encode(), commit
        for file, content in kept.items():
            found[f"{place}/resolve/{revision}/{file}"] = content, commit
    return found | {api: found[f"{api}/revision/main"]}


def _listed(files: Files, folder: Path) -> list[dict[str, object]]:
    """Files under a folder, and the folders on the way: a listing may always say more than asked."""
    inside = [Path(file) for file in files if folder in Path(file).parents]
    folders = {parent for file in inside for parent in file.parents if folder in parent.parents}
    listed = [{"type": "directory", "path": str(path), "size": 0, "oid": ""} for path in folders]
    for path, content in ((str(file), files[str(file)]) for file in inside):
        listed.append({"type": "file", "path": path, "size": len(content), "oid": _oid(content)})
    return listed


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class StandInHub(ThreadingHTTPServer):
    """The server; `requests` holds method and path of everything it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), RequestHandler)
        self.answers = {}
        for kind, name, files in (
            ("models", HUB_MODEL, model_files),
            ("models", language.HUB_MODEL, lambda revision: model_files(revision, tiny_llama)),
            ("datasets", HUB_DATASET, dataset_files),
        ):
            self.answers |= answers(kind, name, {commit: files(at) for at, commit in COMMITS.items()})
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
    """Gives the answer, or says whether it is the revision or a file of it that is not there."""

    protocol_version = "HTTP/1.1"
    server: StandInHub

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        content, commit = self.server.answers.get(path, (None, ""))
        self.send_response(200 if content is not None else 404)
        if content is None:
            asked = re.search(r"/(?:resolve|revision|tree)/([^/]+)", path)
            commit = dict(COMMITS, **{one: one for one in COMMITS.values()}).get(
                asked[1] if asked else "", ""
            )
            self.send_header("X-Error-Code", "EntryNotFound" if commit else "RevisionNotFound")
            content = b""
        else:
            self.send_header("ETag", f'"{_oid(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET  # noqa: N815 (the name that http.server calls)

    def log_message(self, *_: object) -> None:
        """Silence: `StandInHub.requests` is the log."""
