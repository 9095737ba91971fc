"""What `make` says when something is in the way: which thing, and what to do. Nothing is installed."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="the commands are make's")


def make(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess:
    """Run make at the root of the repository, with nothing of a make that runs these tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        [shutil.which("make"), f"PYTHON={sys.executable}", *arguments],
        cwd=ROOT,
        env=kept | ({"PATH": path} if path else {}),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def machine(tmp_path):
    """A machine without programs, the shell apart; gives it some, which note how they are called."""

    def add(name: str, says: str = "") -> Path:
        calls = tmp_path / f"{name}-calls"
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\necho {says}\n')
        program.chmod(0o755)
        return calls

    add.path = str(tmp_path)
    return add


def test_a_port_that_is_taken_is_told_before_anything_is_built():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        told = make("docs-serve", f"PORT={port}")
    assert told.returncode != 0
    assert f"Port {port} is taken" in told.stderr
    assert f"make docs-serve PORT={port + 1}" in told.stderr
    assert "pip" not in told.stdout
    assert "Traceback" not in told.stderr


def test_a_free_port_is_no_obstacle():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert make("port", f"PORT={port}").returncode == 0


def test_without_apt_a_missing_chromium_is_named_with_what_to_install(machine):
    told = make("chromium", path=machine.path)
    assert told.returncode != 0
    assert "Chromium is missing. Install the package chromium" in told.stderr


def test_without_root_a_missing_chromium_is_left_to_those_who_may(machine):
    asked = machine("apt-get")
    machine("id", says="1000")
    told = make("chromium", path=machine.path)
    assert told.returncode != 0
    assert "as root: apt-get install chromium" in told.stderr
    assert not asked.exists()


def test_root_gets_chromium_from_the_system(machine):
    asked = machine("apt-get")
    machine("id", says="0")
    assert make("chromium", path=machine.path).returncode == 0
    assert asked.read_text().splitlines()[-1].split()[-1] == "chromium"


def test_help_lists_every_target_that_has_a_purpose():
    explained = re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^make ([\w-]+) ", make("help").stdout, re.MULTILINE)
    assert listed == explained
    assert {"notebooks", "test", "docs-serve", "lab"} <= set(listed)
