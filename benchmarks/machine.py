"""What the numbers were measured on, in words."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import torch

from support.ekfac.matrix_products import onednn_is_quicker

PYDVL_REQUIREMENTS = Path(__file__).parent / "requirements-pydvl.txt"


def described() -> dict[str, str]:
    """Processor, cores, memory, system, and versions of what does the work in either environment."""
    ours = [f"{name} {version(name)}" for name in ("torch", "transformers", "kronfluence", "numpy")]
    pins = re.findall(r"^(pyDVL|torch|transformers|numpy)==(\S+)", PYDVL_REQUIREMENTS.read_text(), re.M)
    return {
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "products by": "oneDNN" if onednn_is_quicker() else "MKL",
        "cores": f"{usable_cores()} (torch uses {torch.get_num_threads()} threads)",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.machine()}",
        "ours, Kronfluence": f"Python {platform.python_version()}, " + ", ".join(ours),
        "pyDVL": ", ".join(f"{name} {pinned}" for name, pinned in pins),
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
