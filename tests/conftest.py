"""What several test modules need. Imports stay inside the fixtures: the engine's tests need none."""

import shutil
import subprocess

import pytest


@pytest.fixture(scope="session")
def imdb():
    """The packaged reviews."""
    from support.imdb import load_imdb

    return load_imdb()


@pytest.fixture(scope="session")
def tokenizer():
    """The packaged tokenizer."""
    from support.model import load_tokenizer

    return load_tokenizer()


@pytest.fixture(scope="module")
def alone():
    """Makes teams of this process alone, each with counts of its own."""
    from torch import distributed as dist

    from support.job.team import Team, assembled

    with assembled():
        yield lambda: Team(dist.HashStore())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Folders of a tiny model and of reviews for it."""
    from tests.tiny_job import make_model, make_reviews

    folder = tmp_path_factory.mktemp("inputs")
    return make_model(folder / "model"), make_reviews(folder / "reviews")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A store after `run`, with its curvature from five of the training examples."""
    from support.job.command import main
    from tests.tiny_job import options

    store = tmp_path_factory.mktemp("finished") / "store"
    assert main(["run", *options(*inputs, store), "--fit-rows", "5"]) == 0
    return store


@pytest.fixture
def said(capsys):
    """What a job's command says when it ends well, or why it does not."""
    from support.job.command import main

    def run(*arguments, status=0):
        assert main([str(argument) for argument in arguments]) == status
        out, err = capsys.readouterr()
        return err if status else out

    return run


@pytest.fixture
def figure(monkeypatch):
    """Draws: the figure that a function shows when it gets these arguments."""
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: None)

    def draw(function, *arguments):
        function(*arguments)
        shown = plt.gcf()
        shown.canvas.draw()
        return shown

    yield draw
    plt.close("all")


@pytest.fixture
def small_disk(tmp_path):
    """Makes a folder that holds so many kilobytes and no more, or more `again`."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mounted(kilobytes, again=False):
        size = f"size={kilobytes}k"
        options = ["-o", f"remount,{size}"] if again else ["-t", "tmpfs", "-o", size, "tmpfs"]
        mount = ["mount", *options, str(folder)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("this machine lets no small file system be mounted")
        return folder

    yield mounted
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def offline(monkeypatch):
    """No hub is asked."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
