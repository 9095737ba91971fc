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
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from browser.conftest import ROOT

CHAPTER = "06_layers.ipynb"
STARTS_IN, RUNS_IN = 60, 400  # seconds
NO_WINDOWING = {"windowingMode": "none"}
"""Cells out of sight are drawn, too."""


@pytest.fixture
def notebooks(tmp_path: Path) -> Path:
    """A copy, because running in JupyterLab writes into the notebook."""
    return Path(shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks"))


@pytest.fixture
def lab(notebooks: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a JupyterLab with a token, listening on this machine only."""
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
        yield f"http://127.0.0.1:{port}/lab/tree/{CHAPTER}?token={token}&reset"
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


def test_a_chapter_runs_in_jupyterlab(page: Page, lab: str, notebooks: Path):
    page.goto(lab)
    parameters = page.locator(".jp-CodeCell .cm-line", has_text="ci = False").first
    parameters.wait_for(timeout=1000 * STARTS_IN)
    expect(page.locator(".jp-Notebook-ExecutionIndicator").first).to_have_attribute(
        "data-status", "idle", timeout=1000 * STARTS_IN
    )
    parameters.click()
    page.keyboard.press("End")
    page.keyboard.press("Shift+Home")
    page.keyboard.type("ci = True")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    last = page.locator(".jp-CodeCell").last
    expect(last.locator(".jp-InputPrompt")).to_have_text(
        str(code_cells(notebooks)).join(["[", "]:"]), timeout=1000 * RUNS_IN
    )
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert page.locator(".jupyter-widgets .progress-bar, .jupyter-widgets .widget-html").count()
    figures = page.locator(".jp-OutputArea-output img")
    assert figures.count() >= 3
    assert all(f.evaluate("i => i.naturalWidth") > 0 for f in figures.all())
    page.keyboard.press("Control+s")
    page.wait_for_function("!document.querySelector('.jp-mod-dirty')")
    assert errors(notebooks) == []


def stored(notebooks: Path) -> list[dict]:
    cells = json.loads((notebooks / CHAPTER).read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def code_cells(notebooks: Path) -> int:
    return len(stored(notebooks))


def errors(notebooks: Path) -> list[str]:
    """What went wrong in the stored notebook, cell by cell."""
    outputs = [output for cell in stored(notebooks) for output in cell["outputs"]]
    return [output["ename"] for output in outputs if output["output_type"] == "error"]
