"""Every Triton kernel compiles for three generations of GPU, on any machine, without spilling registers.

And every op is complete: a reference of the same signature, a test, a benchmark and a compile case.
"""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kernels
from kernels import reference

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

ROOT = Path(__file__).parents[2]
OPS = sorted(name for name in kernels.__all__ if callable(getattr(kernels, name)))
F32, BF16, I32, I64 = "*fp32", "*bf16", "i32", "i64"
# modules that share their op's name, which is what the package's attribute holds
pairs, views = sys.modules["kernels.weighted_loss"], sys.modules["kernels.clip_views"]
PAIR = ("masks", "weights", "partials")
VIEWS = {"frames": "*u8", "mean": F32, "std": F32}

CASES = {
    # kernel: [(types of arguments, constants, arguments that are multiples of 16, warps), ...]
    "pair_kernel": [
        (
            {"student": x, "teacher": y, "grads": y, **dict.fromkeys(PAIR, F32)}
            | {"pair": I32, "num_clips": I32, "size": I32},
            {"CLIPS": 16, "SIZE": pairs.BLOCK, "SAVE": save},
            ("student", "teacher", "grads", *PAIR, *aligned),
            pairs.WARPS,
        )
        for x, y, save, aligned in (
            (F32, F32, True, ["size"]),
            (BF16, BF16, True, ["size"]),
            (BF16, BF16, True, []),
            ("*fp16", F32, False, ["size"]),
        )
    ],
    "values_kernel": [
        (
            {"partials": F32, "masks": F32, "values": F32, "num_clips": I32},
            {"TILES": pairs.MAX_TILES, "CLIPS": 16},
            ("partials", "masks", "values"),
            4,
        )
    ],
    "views_kernel": [
        (
            {**VIEWS, "rgb": out, "grey": out, "pixels": I32, "clip_stride": I64},
            {"SIZE": views.BLOCK},
            (*VIEWS, "rgb", "grey", *aligned),
            4,
        )
        for out, aligned in (
            (F32, ["pixels", "clip_stride"]),
            (BF16, ["pixels", "clip_stride"]),
            (BF16, []),
        )
    ],
}
MAX_REGISTERS = {"pair_kernel": 64, "values_kernel": 64, "views_kernel": 80}
"""At 64 a multiprocessor holds 1024 threads, at 80 it holds 768: enough loads under way for its bandwidth."""


def jit_functions():
    """Every @triton.jit function in the package, by name."""
    found = {}
    for path in (ROOT / "kernels").glob("*.py"):
        module = sys.modules["kernels" if path.stem == "__init__" else f"kernels.{path.stem}"]
        for name, value in vars(module).items():
            if (
                isinstance(value, triton.runtime.JITFunction)
                and value.fn.__module__ == module.__name__
            ):
                found[name] = value
    return found


def compile_kernel(name, case, capability, directory):
    """The PTX, and the registers, stack and local bytes of a thread."""
    kernel = jit_functions()[name]
    types, constants, aligned, warps = case
    place = {argument: i for i, argument in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={a: types.get(a, "constexpr") for a in kernel.arg_names},
        constexprs={(place[a],): value for a, value in constants.items()},
        attrs={(place[a],): [["tt.divisibility", 16]] for a in aligned},
    )
    binary = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )
    cubin = directory / f"{name}.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(
        r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage.stdout
    ).groups()
    return binary.asm["ptx"], int(registers), int(stack), int(local)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills(name, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for case in CASES[name]:
        ptx, registers, stack, local = compile_kernel(name, case, capability, tmp_path)
        assert f"sm_{capability}" in ptx
        assert (stack, local) == (0, 0), f"{case}: spills to local memory"
        assert registers <= MAX_REGISTERS[name], case
        if {"size", "pixels"} & set(case[2]):
            assert re.search(r"ld\.global\.v[24]", ptx), f"{case}: loads are not wide"
            assert "st.global.v4" in ptx or not case[1].get("SAVE", True), (
                f"{case}: stores are not wide"
            )


def test_every_kernel_has_a_compile_case():
    found = jit_functions()
    assert found, "the search itself must find something"
    assert set(found) == set(CASES) == set(MAX_REGISTERS)
    text = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert text.count("@triton.jit") == len(found), "a kernel that the search does not see"


def test_every_op_is_complete():
    assert OPS, "the search itself must find something"
    for op in OPS:
        signature = inspect.signature(getattr(kernels, op))
        assert inspect.signature(getattr(reference, op)) == signature, f"{op}: reference differs"
        module = sys.modules[f"kernels.{op}"].__name__
        owned = [k for k in jit_functions().values() if k.fn.__module__ == module]
        assert owned, f"{op}: no kernel"
        test = (ROOT / "tests" / "kernels" / f"test_{op}.py").read_text()
        assert f"kernels.{op}" in test and "interpret(__file__)" in test, f"{op}: not tested"
        bench = (ROOT / "benchmarks" / f"bench_{op}.py").read_text()
        assert f"kernels.{op}" in bench, f"{op}: not in a benchmark"


def test_kernels_work_without_triton():
    """The reference path alone, as on a machine for which there is no Triton."""
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
assert kernels.__engine_kernels__ and not kernels.HAS_TRITON
one = torch.ones(2, 3)
total, _ = kernels.weighted_loss([one], [one * 3], one[:1, :2], one[0, :1], one[0, :0])
assert total == 4
rgb, _ = kernels.clip_views(torch.zeros(1, 2, 2, 2, 3, dtype=torch.uint8), one[0], one[0])
assert (rgb == -1).all()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
