"""What a machine has, and which path each stage takes on it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec

import torch

from engine.runtime import check_kernels_package, num_cores

Row = tuple[str, str, str]
"""Part, what was found, the path taken or what to do."""

MIN_CUDNN = 91500
"""bf16 conv3d is slow, and at large shapes wrong, in cuDNN 9.8 to 9.14 (pytorch issues 166122, 166643)."""


def diagnose() -> Sequence[Row]:
    """One row a part: device, networks, decoding, flow, k-means, kernels."""
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"CPU, {num_cores()} cores"
    return [
        ("device", name, "bf16 autocast" if gpu else "float32"),
        ("torch", torch.__version__, _cudnn(gpu)),
        ("DALI", _version("nvidia-dali-cuda130", "nvidia-dali-cuda120"), _decoding(gpu)),
        (
            "nvImageCodec",
            _version("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"),
            "JPEG decoding needs it",
        ),
        ("video decoder", _library("libnvcuvid.so.1"), "only for shards of video streams"),
        ("flow", _library("libnvidia-opticalflow.so.1"), _flow(gpu)),
        ("k-means", _version("cuml-cu13", "cuml-cu12"), _kmeans(gpu)),
        (
            "Triton",
            _version("triton"),
            "fused kernels" if gpu else "not used on a CPU: plain PyTorch",
        ),
        ("kernels", *_kernels()),
    ]


def _version(*packages: str) -> str:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "absent"


def _library(name: str) -> str:
    try:
        ctypes.CDLL(name)
    except OSError:
        return "absent"
    return "found"


def _cudnn(gpu: bool) -> str:
    if not gpu:
        return "oneDNN"
    version = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    if version < MIN_CUDNN:
        return f"cuDNN {version}: update to 9.15 or newer, bf16 conv3d is slow or wrong before"
    return f"cuDNN {version}"


def _decoding(gpu: bool) -> str:
    if _version("nvidia-dali-cuda130", "nvidia-dali-cuda120") == "absent":
        return "install the extra cpu, cuda12 or cuda13: nothing can be decoded without DALI"
    return "JPEG engines" if gpu else "libjpeg-turbo on the CPU"


def _flow(gpu: bool) -> str:
    if not gpu:
        return "OpenCV's DIS on the CPU"
    if _library("libnvidia-opticalflow.so.1") == "absent":
        asked = os.environ.get("NVIDIA_DRIVER_CAPABILITIES", "unset")
        return f"absent: start the container with NVIDIA_DRIVER_CAPABILITIES=compute,video,utility (now {asked})"
    return "the GPU's flow engine"


def _kmeans(gpu: bool) -> str:
    if not gpu:
        return "scikit-learn"
    if find_spec("cuml") is None:
        return "scikit-learn; the extras cuda12 and cuda13 bring cuML"
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        return f"cupy does not load ({error}); cuML needs numpy<2.5, pandas<3.1, numba<0.65"
    return "cuML"


def _kernels() -> tuple[str, str]:
    try:
        check_kernels_package()
    except RuntimeError as error:
        return "hidden", str(error)
    return "the engine's own", "ready"
