"""A real JupyterLab on 127.0.0.1: a chapter is opened, set to its small size, run and looked at."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError

import nbformat
import psutil
import pytest
from playwright.sync_api import Page, expect

from browser.conftest import ROOT

CHAPTER = "06_layers.ipynb"
STARTS_IN, RUNS_IN, SAVES_IN = 60, 400, 20  # seconds
NO_WINDOWING = {"windowingMode": "none"}
"""Cells out of sight are drawn, too."""


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab."""

    address: str
    token: str
    process: int


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, which JupyterLab writes into, without outputs: what is seen later was made here."""
    copy = shutil.copytree(ROOT / "notebooks", tmp_path_factory.mktemp("lab") / "notebooks")
    chapter = nbformat.read(copy / CHAPTER, as_version=4)
    for cell in chapter.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(chapter, copy / CHAPTER)
    return copy


@pytest.fixture(scope="module")
def lab(notebooks: Path) -> Iterator[Lab]:
    """A JupyterLab with a token, listening on this machine only."""
    tmp_path = notebooks.parent
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps(NO_WINDOWING))
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--notebook-dir={notebooks}", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}"]
    command += [f"--LabApp.user_settings_dir={tmp_path / 'settings'}"]
    environment = {**os.environ, "SUPPORT_CACHE": str(tmp_path / "cache")}
    log = (tmp_path / "lab.log").open("w")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, tmp_path / "lab.log")
        yield Lab(f"http://127.0.0.1:{port}", token, server.pid)
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(2 * STARTS_IN):
        if server.poll() is not None:
            pytest.fail(f"JupyterLab ended with {server.returncode}:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"JupyterLab did not answer in {STARTS_IN} s:\n{log.read_text()[-2000:]}")


def test_nobody_gets_in_without_the_token(lab: Lab):
    with pytest.raises(HTTPError, match="403"):
        urllib.request.urlopen(f"{lab.address}/api/contents", timeout=5)
    with urllib.request.urlopen(f"{lab.address}/api/contents?token={lab.token}", timeout=5) as told:
        assert CHAPTER in told.read().decode()


def test_nothing_listens_to_other_machines(lab: Lab):
    sockets = psutil.Process(lab.process).net_connections("inet")
    listening = {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_a_chapter_runs_in_jupyterlab(page: Page, lab: Lab, notebooks: Path):
    page.goto(f"{lab.address}/lab/tree/{CHAPTER}?token={lab.token}&reset")
    make_small(page)
    run_all(page)
    expect(page.locator(".jp-CodeCell").last.locator(".jp-InputPrompt")).to_have_text(
        f"[{len(code_cells(notebooks))}]:", timeout=1000 * RUNS_IN
    )
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    bars = page.locator(".jupyter-widgets .progress-bar")
    assert bars.count()
    assert page.locator(".jupyter-widgets .progress-bar-success").count() == bars.count()
    figures = page.locator(".jp-OutputArea-output img")
    assert figures.count() >= 2
    assert all(f.evaluate("i => i.naturalWidth") > 0 for f in figures.all())
    save(page, notebooks)
    assert "ci = True" in code_cells(notebooks)[0]["source"]
    assert errors(notebooks) == []


def make_small(page: Page) -> None:
    """Set `ci` by hand, once the kernel is ready."""
    line = page.locator(".jp-CodeCell .cm-line", has_text="ci = False").first
    line.wait_for(timeout=1000 * STARTS_IN)
    expect(page.locator(".jp-Notebook-ExecutionIndicator").first).to_have_attribute(
        "data-status", "idle", timeout=1000 * STARTS_IN
    )
    line.click()
    page.keyboard.press("End")
    page.keyboard.press("Shift+Home")
    page.keyboard.type("ci = True")


def run_all(page: Page) -> None:
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def save(page: Page, notebooks: Path) -> None:
    """Save the notebook, and wait until its last output is on the disk."""
    page.keyboard.press("Control+s")
    for _ in range(2 * SAVES_IN):
        if code_cells(notebooks)[-1]["outputs"]:
            return
        time.sleep(0.5)
    pytest.fail(f"JupyterLab did not save {CHAPTER} in {SAVES_IN} s.")


def code_cells(notebooks: Path) -> list[dict]:
    """Those of the stored notebook."""
    cells = nbformat.read(notebooks / CHAPTER, as_version=4).cells
    return [cell for cell in cells if cell["cell_type"] == "code"]


def errors(notebooks: Path) -> list[str]:
    """What went wrong in the stored notebook, cell by cell."""
    outputs = [output for cell in code_cells(notebooks) for output in cell["outputs"]]
    return [output["ename"] for output in outputs if output["output_type"] == "error"]
