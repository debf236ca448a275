"""Checks a machine: the libraries and devices there, and the path that each stage takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from engine.core.provenance import installed_version
from engine.core.recipe import Clip
from engine.core.runtime import check_kernels_package, cpu_has_bf16, num_cores
from engine.data.hardware import FILM_LIBRARY, FLOW_LIBRARY, flow_fault, missing, picture_fault
from engine.train.precision_check import OLDEST_CUDNN

Row = tuple[str, str, str]
"""Part, what there is, the path taken or what to do."""
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
NVIMGCODEC = ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12")


def diagnose() -> Sequence[Row]:
    """One row a part: device, networks, decoding, flow, k-means, kernels, step."""
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"CPU, {num_cores()} cores"
    on_cpu = "float32, bf16 where asked for" if cpu_has_bf16() else "float32 (no AMX: no bf16)"
    fused = "fused kernels" if gpu else "not used on a CPU: plain PyTorch"
    return [
        ("device", name, "bf16 autocast" if gpu else on_cpu),
        ("torch", torch.__version__, _cudnn(gpu)),
        ("DALI", _version(*DALI), _decoding(gpu)),
        ("nvImageCodec", _version(*NVIMGCODEC), "JPEG decoding needs it"),
        ("video decoder", _library(FILM_LIBRARY), _films(gpu)),
        ("flow", _library(FLOW_LIBRARY), _flow(gpu)),
        ("k-means", _version("cuml-cu13", "cuml-cu12"), _kmeans(gpu)),
        ("Triton", _version("triton"), fused),
        ("kernels", *_kernels()),
        ("step", *_step(gpu)),
    ]


def _version(*packages: str) -> str:
    return installed_version(*packages) or "absent"


def _library(name: str) -> str:
    return "absent" if missing(name) else "found"


def _cudnn(gpu: bool) -> str:
    if not gpu:
        return "oneDNN"
    version = torch.backends.cudnn.version() or 0
    if version < OLDEST_CUDNN:
        return f"cuDNN {version}: update to 9.15 or newer, bf16 conv3d is slow or wrong before"
    return f"cuDNN {version}"


def _decoding(gpu: bool) -> str:
    if _version(*DALI) == "absent":
        return "install the extra cpu, cuda12 or cuda13: nothing can be decoded without DALI"
    if not gpu:
        return "libjpeg-turbo on the CPU"
    fault = picture_fault(_first_gpu())
    return (
        f"libjpeg-turbo on the CPU: {fault}" if fault else "on the GPU, by its JPEG engines if any"
    )


def _films(gpu: bool) -> str:
    only = "only for shards of video streams"
    fault = missing(FILM_LIBRARY) if gpu else ""
    return f"{only}: VP9 on the CPU, H.264 and HEVC not at all: {fault}" if fault else only


def _flow(gpu: bool) -> str:
    on_cpu = "OpenCV's DIS on the CPU"
    if not gpu:
        return on_cpu
    fault = flow_fault(_first_gpu(), Clip().size)
    return f"{on_cpu}: {fault}" if fault else "the GPU's flow engine"


def _first_gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _kmeans(gpu: bool) -> str:
    if not gpu:
        return "scikit-learn"
    own = "the engine's own, all members in one batch"
    if find_spec("cuml") is None:
        return f"{own}; the extras cuda12 and cuda13 bring cuML (fitness.kmeans=cuml)"
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        return f"{own}; cuML can't: cupy does not load ({error}); it needs numpy<2.5, pandas<3.1, numba<0.65"
    return f"{own}; cuML by fitness.kmeans=cuml"


def _kernels() -> tuple[str, str]:
    try:
        check_kernels_package()
    except RuntimeError as error:
        return "hidden", str(error)
    return "the engine's own", "ready"


def _step(gpu: bool) -> tuple[str, str]:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        needed = "install gcc: torch.compile needs it"
        return "no C compiler", needed if gpu else "eager; torch.compile would need gcc"
    eager = "eager, a member a core (optim.compile=default compiles)"
    return compiler, "torch.compile" if gpu else eager
