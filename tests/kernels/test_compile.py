"""Every Triton kernel compiles for three generations of GPU, on any machine, without spilling registers.

And every op is complete: a reference of the same signature, a test, a benchmark and a compile case.
"""

import ast
import inspect
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import kernels
from kernels import reference

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

ROOT = Path(__file__).parents[2]
OPS = sorted(name for name in kernels.__all__ if callable(getattr(kernels, name)))
F32, I32, I64 = "*fp32", "i32", "i64"
# modules that share their op's name, which is what the package's attribute holds
loss, views = sys.modules["kernels.weighted_loss"], sys.modules["kernels.clip_views"]
f32, bf16, f16 = triton.language.float32, triton.language.bfloat16, triton.language.float16
LONG, SHORT, WIDENED = (f32, f32, f32), (bf16, bf16, bf16), (f16, f32, f32)
FACTS = ("firsts", "students", "teachers", "grads", "shapes")
VIEWS = {"frames": "*u8", "mean": F32, "std": F32}


@dataclass
class Case:
    """One way to call a kernel."""

    types: dict[str, str | tuple[str, ...]]
    constants: dict[str, object]
    aligned: tuple[str, ...]
    """Arguments that are multiples of 16."""
    warps: int
    registers: int
    """Most a thread. At 64 a multiprocessor holds 1024 threads, at 80 it holds 768, at 128 it holds 512: at 64
    bytes a thread still 32 kB under way, of which an H100 wants 18."""
    wide: tuple[bool, bool] | None = None
    """Whether loads and stores of 16 bytes are expected; None where some are and some are not."""


def pairs_case(*kinds, pairs=16, registers=64, save=True):
    pointers = ("masks", "weights", "divisors", "partials")
    wide = {kind[3] for kind in kinds}
    return Case(
        {**dict.fromkeys(FACTS, (I64,) * pairs), **dict.fromkeys(pointers, F32), "num_clips": I32},
        {"KINDS": kinds, "CLIPS": 16, "BLOCK": loss.BLOCK, "CHUNK": loss.CHUNK, "SAVE": save},
        pointers,
        loss.WARPS,
        registers,
        None if len(wide) == 2 else (wide == {True}, wide == {True} and save),
    )


def values_case(rows):
    pointers = ("partials", "weights", "divisors", "scalars", "values", "total")
    types = dict.fromkeys(("pairs", "num_scalars", "longest"), I32)
    return Case(
        {"firsts": (I64,) * (rows + 8), **dict.fromkeys(pointers, F32), **types},
        {"ROWS": rows, "COLUMNS": loss.SUMS // rows},
        pointers,
        loss.SUM_WARPS,
        64,
    )


def scale_case(*kinds, pairs=16):
    return Case(
        {**dict.fromkeys(("firsts", "grads", "shapes"), (I64,) * pairs), "scale": F32},
        {"KINDS": kinds, "BLOCK": loss.BLOCK, "CHUNK": loss.SCALE_CHUNK},
        (),
        loss.WARPS,
        80,
        None if len(kinds) > 1 else (kinds[0][1],) * 2,
    )


def views_case(out, *aligned):
    return Case(
        {**VIEWS, "rgb": out, "grey": out, "pixels": I32, "clip_stride": I64},
        {"SIZE": views.BLOCK},
        (*VIEWS, "rgb", "grey", *aligned),
        4,
        80,
        (True, True) if aligned else None,
    )


CASES = {
    "pairs_kernel": [
        pairs_case((*LONG, True)),
        pairs_case((*SHORT, True)),
        pairs_case((*SHORT, True), save=False),
        pairs_case((*SHORT, False), registers=96),
        pairs_case((*WIDENED, True)),
        pairs_case((*SHORT, True), pairs=40, registers=128),
        pairs_case((*SHORT, False), (*SHORT, True), (*LONG, True), pairs=40, registers=128),
    ],
    "values_kernel": [values_case(16), values_case(64)],
    "scale_kernel": [
        scale_case((bf16, True)),
        scale_case((bf16, False)),
        scale_case((bf16, False), (bf16, True), (f32, True), pairs=40),
    ],
    "views_kernel": [
        views_case(F32, "pixels", "clip_stride"),
        views_case("*bf16", "pixels", "clip_stride"),
        views_case("*bf16"),
    ],
}


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
    place = {argument: i for i, argument in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={a: case.types.get(a, "constexpr") for a in kernel.arg_names},
        constexprs={(place[a],): value for a, value in case.constants.items()},
        attrs={(place[a],): [["tt.divisibility", 16]] for a in case.aligned},
    )
    binary = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": case.warps}
    )
    cubin = directory / f"{name}.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(
        r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage.stdout
    ).groups()
    return binary.asm["ptx"], int(registers), int(stack), int(local)


def accesses(ptx):
    """How many loads and stores of several registers there are, and whether 16-bit ones."""
    wide = [len(re.findall(rf"{way}\.global[.\w]*\.v[24]", ptx)) for way in ("ld", "st")]
    return (*wide, bool(re.search(r"(ld|st)\.global[.\w]*\.[bu]16", ptx)))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills(name, capability, cache):
    for case in CASES[name]:
        ptx, registers, stack, local = compile_kernel(name, case, capability, cache)
        assert f"sm_{capability}" in ptx
        assert (stack, local) == (0, 0), f"{case}: spills to local memory"
        assert registers <= case.registers, case
        if case.wide is not None:
            loads, stores, halves = accesses(ptx)
            assert (loads > 0, stores > 0) == case.wide, f"{case}: loads or stores"
            assert not (halves and case.wide[0]), f"{case}: 16-bit loads or stores are left"


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_unaligned_pairs_beside_aligned_ones_are_not_accessed_wide(cache):
    """What the compiler is promised of one kind must not reach another: it would fault."""
    one, two = (*SHORT, True), (*SHORT, False)
    alone, both = (
        accesses(compile_kernel("pairs_kernel", pairs_case(*kinds), 90, cache)[0])
        for kinds in ((one,), (two, one))
    )
    assert alone[:2] == both[:2] and min(alone[:2]) > 0
    assert both[2] and not alone[2]


def test_only_aligned_rows_are_promised_to_be():
    rows = [torch.zeros(2, 16), torch.zeros(33)[1:].view(2, 16), torch.zeros(2, 12)]
    kinds, which = loss._kinds([rows, rows], [16, 16, 12])
    assert [kinds[k] for k in which] == [(f32, f32, True), (f32, f32, False), (f32, f32, False)]


def test_pairs_compile_nothing_anew():
    """Whatever their addresses and sizes, and within 8 their number, Triton sees the same types."""
    specialize = triton.runtime.jit.native_specialize_impl
    backend = type(triton.compiler.make_backend(GPUTarget("cuda", 90, 32)))
    seen = {
        str(specialize(backend, loss._encoded(facts), False, True, True))
        for facts in ([0], [1] * 8, [16, 2**31, 2**57 - 2], [7] * 5)
    }
    assert len(seen) == 1


def test_every_kernel_has_a_compile_case():
    found = jit_functions()
    assert found, "the search itself must find something"
    kernels_found = {name for name in found if not name.startswith("_")}  # others are inlined
    assert kernels_found == set(CASES)
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
        text = (ROOT / "tests" / "kernels" / f"test_{op}.py").read_text()
        assert f"kernels.{op}" in text and "interpret(__file__)" in text, f"{op}: not tested"
        tests = {
            node.name: ast.get_source_segment(text, node)
            for node in ast.parse(text).body
            if isinstance(node, ast.FunctionDef)
        }
        assert any(f"torch.library.opcheck(kernels._{op}" in body for body in tests.values()), (
            f"{op}: no opcheck"
        )
        # by name: what is computed in float64, and that the shapes are odd, is for a reader to see
        assert "test_odd_shapes_and_dtypes" in tests and ".double()" in text, f"{op}: no odd shapes"
        benches = (path.read_text() for path in (ROOT / "engine" / "bench").glob("*.py"))
        assert any(f"kernels.{op}" in bench for bench in benches), f"{op}: not in a benchmark"


def test_kernels_work_without_triton():
    """The reference path alone, as on a machine for which there is no Triton."""
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
assert kernels.__engine_kernels__ and not kernels.HAS_TRITON
one = torch.ones(2, 3)
total, _ = kernels.weighted_loss([one], [one * 3], one[:1, :2], one[0, :1], one[0, :1], one[0, :0])
assert total == 4
rgb, _ = kernels.clip_views(torch.zeros(1, 2, 2, 2, 3, dtype=torch.uint8), one[0], one[0])
assert (rgb == -1).all()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
