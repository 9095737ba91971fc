"""Whatever goes wrong with a command is told in one line with its cure, and nothing that a terminal obeys."""

from importlib.metadata import PackageNotFoundError

import pytest
import torch
from transformers import FNetConfig, FNetForSequenceClassification

from support.ekfac.errors import LayerNotSupported, OutputsNotSupported
from support.job.command import main
from support.model import LABELS, load_tokenizer
from tests.tiny_job import options


def test_more_processes_than_gpus_are_told_in_one_line(monkeypatch, said, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    told = said("show", "--store", tmp_path, status=1)
    assert told.strip() == "BadSetting: This machine has 2 GPUs: use --nproc-per-node=2 at most."


def fails(error):
    def run(*_):
        raise error

    return run


LESS = "Smaller --block, --query-block or --max-tokens need less memory."
CPU_FULL = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
LOST = "[gloo/pair.cc:5] Connection closed"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            KeyError("here\nand there"),
            r"KeyError: 'here\nand there' (unexpected: with JOB_TRACEBACK=1 before ",
        ),
        (NotADirectoryError(20, "no folder", "here"), "NotADirectoryError: [Errno 20] no folder: 'here'"),
        (MemoryError(), f"MemoryError:  {LESS}"),
        (torch.OutOfMemoryError("CUDA out of memory."), f"OutOfMemoryError: CUDA out of memory. {LESS}"),
        (RuntimeError(CPU_FULL), f"MemoryError: {CPU_FULL} {LESS}"),
        (LayerNotSupported("no"), "LayerNotSupported: no On the command line: choose other layers, with --l"),
        (OutputsNotSupported("no"), "OutputsNotSupported: no On the command line: name another --model"),
        (
            PackageNotFoundError("a"),
            f"PackageNotFoundError: {PackageNotFoundError('a')} A store tells versions: ",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_told_in_one_line_with_its_kind_and_its_cure(finished, said, monkeypatch, error, told):
    monkeypatch.setattr("support.job.command.shown", fails(error))
    line = said("show", "--store", finished, status=1)
    assert line.startswith(f"\n{told}")
    assert line.count("\n") == 2
    monkeypatch.setenv("JOB_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["show", "--store", str(finished)])


def test_a_worker_that_is_lost_is_told_by_the_others(finished, said, monkeypatch):
    monkeypatch.setattr("support.job.command.shown", fails(RuntimeError(LOST)))
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    told = said("show", "--store", finished, status=1)
    assert f"process 0: Another process was lost, see what it said (RuntimeError: {LOST}" in told
    assert "The same command goes on from where it was." in told


def test_a_model_that_padding_changes_is_refused_with_what_to_name(inputs, said, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "initializer_range": 0.2}
    config = FNetConfig(vocab_size=30522, id2label=LABELS, label2id={}, **sizes)
    FNetForSequenceClassification(config).save_pretrained(tmp_path / "model")
    load_tokenizer().save_pretrained(tmp_path / "model")
    given = options(tmp_path / "model", inputs[1], tmp_path / "store")
    given[given.index("ffn,classifier")] = "classifier"
    told = said("run", *given, status=1)
    assert "OutputsNotSupported: The model says " in told
    assert "name another --model, one that masks padding." in told


FOREIGN = "\x1b[31m\u202egreat\x07\r"
WRITTEN_OUT = r"\x1b[31m\u202egreat\x07"


def test_what_a_terminal_would_obey_in_foreign_text_is_written_out(inputs, said, tmp_path):
    model, own = inputs[0], tmp_path / "reviews"
    own.mkdir()
    for split in ("train", "test"):
        (own / f"{split}.csv").write_text(f'text,label\n"{FOREIGN}",positive\n"{FOREIGN} too",negative\n')
    said("run", *options(model, own, tmp_path / "store"))
    table = said("top", "--store", tmp_path / "store")
    column = said("run", *options(model, own, tmp_path / "2"), "--text-column", FOREIGN, status=1)
    for text in (table, column, said("show", "--store", tmp_path / FOREIGN, status=1)):
        assert WRITTEN_OUT in text
        assert not {"\x1b", "\u202e", "\x07", "\r"} & set(text)


def test_a_job_that_is_stopped_from_the_keyboard_says_how_to_go_on(inputs, said, tmp_path, monkeypatch):
    monkeypatch.setattr("support.job.fit._shards", fails(KeyboardInterrupt()))
    assert "The same command goes on" in said("run", *options(*inputs, tmp_path / "store"), status=1)
