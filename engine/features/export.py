"""The RGB network with its preprocessing as a portable file: raw frames in, features out.

What goes in is uint8 (N, T, H, W, 3), RGB, cut and resized to the card's input; the frames' scaling and normalisation
are inside. What comes out is float32 (N, D), equal to the engine's within 1e-4 of the largest feature: every export
is run before it is written. N is free in both formats; so are T, H and W in ONNX. In torch they are as long as
the last stage keeps several frames (rows, columns) where it had several, and one where it had one.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

import engine
from engine.core.files import write_atomic
from engine.model.network_file import Card
from engine.model.resnet3d import ResNet3D

FORMATS = {".pt2": "torch", ".onnx": "onnx"}
"""Suffix to format."""
TOLERANCE = 1e-4
"""Largest difference from the engine's features that an export may have, as a share of the largest one, or of 1."""


class FramesToFeatures(nn.Module):
    """An RGB network behind its own preprocessing, in operations that every runtime has."""

    def __init__(self, network: ResNet3D, card: Card) -> None:
        super().__init__()
        self.network = network
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(card.mean))
        self.register_buffer("std", torch.tensor(card.std))

    def forward(self, frames: Tensor) -> Tensor:
        """Features (N, D) of uint8 (N, T, H, W, 3)."""
        rgb = (frames.float() / 255 - self.mean) / self.std
        features: Tensor = self.network(rgb.permute(0, 4, 1, 2, 3))
        return features


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    format: str
    difference: float | None
    """Largest difference from the engine's features on random clips; None where nothing here runs the format."""
    bytes: int


def export(network: ResNet3D, card: Card, *, out: Path, format: str | None = None) -> ExportReport:
    """Write ``network`` as ``out``, with its card inside (``card.json``, or metadata ``card``) and as ``out``.json.

    ``format`` is "torch" (a torch.export program) or "onnx"; None: as the suffix says, .pt2 or .onnx. Raises
    ValueError for another one and for a missing package, OSError where it can't be written, and RuntimeError where
    the exported network computes something else.
    """
    chosen = format_of(out, format)
    model = FramesToFeatures(copy.deepcopy(network), card).cpu().float().eval()
    clip = card.input
    shape = (2, clip.num_frames, clip.size, clip.size, 3)
    example = torch.randint(0, 256, shape, dtype=torch.uint8, generator=_generator(0))
    told = {
        **msgspec.to_builtins(card),
        "format": chosen,
        "engine_version": engine.__version__,
        "torch_version": torch.__version__,
        "frames": "uint8 (N, T, H, W, 3), RGB, resized and cut to input; normalised inside",
        "features": f"float32 (N, {network.feature_dim})",
    }
    write = _write_torch if chosen == "torch" else _write_onnx
    with torch.no_grad(), _quiet():
        data, run = write(model, example, json.dumps(told))
        difference = None if run is None else _checked(model, run, shape)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"can't write there: {error.strerror}", str(out)) from None
    write_atomic(out, data)
    write_atomic(out.with_name(f"{out.name}.json"), json.dumps(told, indent=2).encode() + b"\n")
    return ExportReport(chosen, difference, len(data))


def format_of(out: Path, format: str | None) -> str:
    """The format asked for, or else that of the suffix; raises ValueError where there is none."""
    chosen = FORMATS.get(out.suffix) if format is None else format
    if chosen is None or chosen not in FORMATS.values():
        what = f"--format {format}" if format else f"{out}, by its suffix,"
        raise ValueError(f"{what} is no format: use torch (.pt2) or onnx (.onnx)")
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if chosen == "onnx" and missing:
        raise ValueError(
            f"exporting to ONNX needs {' and '.join(missing)}: pip install 'evolved-losses[onnx]'"
        )
    return chosen


Runner = Callable[[Tensor], Tensor]


def _write_torch(model: nn.Module, example: Tensor, card: str) -> tuple[bytes, Runner]:
    free = dict.fromkeys(range(4), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (example,), dynamic_shapes={"frames": free})
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"card.json": card})
    run: Runner = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), run


def _write_onnx(model: nn.Module, example: Tensor, card: str) -> tuple[bytes, Runner | None]:
    free = dict.fromkeys(range(4), torch.export.Dim.DYNAMIC)
    program = torch.onnx.export(
        model,
        (example,),
        input_names=["frames"],
        output_names=["features"],
        dynamic_shapes={"frames": free},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    proto.metadata_props.add(key="card", value=card)
    data = proto.SerializeToString()
    return data, _onnx_runner(data) if find_spec("onnxruntime") else None


def _onnx_runner(data: bytes) -> Runner:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda frames: torch.from_numpy(session.run(None, {"frames": frames.numpy()})[0])


def _checked(model: nn.Module, run: Runner, shape: tuple[int, ...]) -> float:
    """The largest difference on random clips, in other numbers than the example's; raises RuntimeError."""
    worst = 0.0
    for count in (1, 3):
        size = (count, *shape[1:])
        frames = torch.randint(0, 256, size, dtype=torch.uint8, generator=_generator(count))
        wanted = model(frames)
        difference = float((run(frames) - wanted).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(wanted.abs().max())):
            raise RuntimeError(
                f"the exported network differs from the engine's by {difference:.2g}: nothing was written"
            )
        worst = max(worst, difference)
    return worst


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch's exporters say of themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
