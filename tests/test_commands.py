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


def make(*arguments: str) -> subprocess.CompletedProcess:
    """Run make at the root of the repository, with nothing of a make that runs these tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = [shutil.which("make"), f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=60)


def test_a_port_that_is_taken_is_told_before_anything_is_built():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        told = make("docs-serve", f"PORT={port}")
    assert told.returncode != 0
    assert f"Port {port} is taken" in told.stderr
    assert f"make docs-serve PORT={port + 1}" in told.stderr
    assert "pip" not in told.stdout
    assert "Traceback" not in told.stderr
    assert make("port", f"PORT={port}").returncode == 0  # free again


def test_help_lists_every_target_that_has_a_purpose():
    explained = re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^make ([\w-]+) ", make("help").stdout, re.MULTILINE)
    assert listed == explained
    assert {"notebooks", "test", "docs-serve", "lab"} <= set(listed)
