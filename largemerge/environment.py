"""What a merge runs on: versions and machine, for reports and manifests."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import psutil
import torch

_PACKAGES = ("largemerge", "torch", "transformers", "accelerate", "safetensors", "bitsandbytes")


def versions() -> dict[str, str]:
    """Versions of largemerge and of what it stands on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What the merge ran on."""
    described = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": str(device),
    }
    if device.type == "cuda":
        described["device_name"] = torch.cuda.get_device_name(device)
    return described


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = [line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()
