"""Virtual environments for other tools, so that their versions and ours never meet."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

OWN_TORCH = f"torch=={torch.__version__.split('+')[0]}"
"""The torch that runs this: by default a peer gets the same one."""


def make_environment(folder: Path, requirements: Sequence[str], torch: str = OWN_TORCH) -> Path:
    """Makes a virtual environment, unless one of the very same requirements is there.

    Args:
        folder: Where it goes; an environment of other requirements that is there is removed.
        requirements: What pip installs, as on its command line.
        torch: Requirement of torch. It goes first, and holds for the others too: none may replace it by a build
            that is gigabytes larger.

    Returns:
        Path of its Python.
    """
    python = folder / "bin" / "python"
    wanted = "\n".join([sys.version, torch, *requirements])
    marker = folder / "installed.txt"
    if marker.is_file() and marker.read_text() == wanted:
        return python
    print(f"installing {', '.join([torch, *requirements])} into {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "-qq", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, torch, *requirements], check=True)
    marker.write_text(wanted)
    return python
