"""The machine that times are measured on."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import torch

_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
"""Names of a processor's bfloat16 matrix instructions in Linux, the fastest first."""


def describe_machine(device: torch.device) -> str:
    """Processor or accelerator, instruction set, threads and torch's version, on one line."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name, flags = _processor()
    known = [torch.backends.cpu.get_cpu_capability(), *(unit for unit in _UNITS if unit in flags)]
    return (
        f"{name} ({', '.join(known)}), {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices faster in bfloat16 than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(unit in _processor()[1] for unit in _UNITS)


def compiler_found() -> bool:
    """Whether there is a C++ compiler, which ``torch.compile`` needs."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl"))


def _processor() -> tuple[str, set[str]]:
    """The processor's name, and what it can do as far as the system says."""
    name = platform.processor() or platform.machine()
    flags: set[str] = set()
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return name, flags
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            name = value
        elif key in ("flags", "Features"):
            flags = set(value.split())
    return name, flags
