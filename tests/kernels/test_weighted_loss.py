"""Eq. 1 against float64 arithmetic in NumPy: on the CPU path, the Triton kernels and the plain equation."""

import os
import sys

import numpy as np
import pytest
import torch
import torch._dynamo.testing

import kernels
from kernels import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()
FUNCTIONS = [kernels.weighted_loss, reference.weighted_loss][: 1 if INTERPRETED else 2]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# bfloat16 differences are rounded when saved, and the interpreter rounds towards zero
TOLERANCE = {F32: 2e-6, F16: 2e-3, BF16: 2e-2}
MIXED = [(F32, F32), (BF16, BF16), (F16, F32), (BF16, F32), (F16, F16)]
SHAPES = [(3, 1), (3, 3), (3, 63), (3, 500), (3, 2, 3, 5, 7), (3, 5, 1, 9)]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Sizes so small that odd shapes take several chunks, and chunks several blocks."""
    if INTERPRETED:
        for name, size in {"BLOCK": 64, "CHUNK": 192, "SCALE_CHUNK": 320, "SUMS": 64}.items():
            monkeypatch.setattr(sys.modules["kernels.weighted_loss"], name, size)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched so far."""
    module, names = sys.modules["kernels.weighted_loss"], []

    class Counted:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for name in ("pairs_kernel", "values_kernel", "scale_kernel"):
        monkeypatch.setattr(module, name, Counted(getattr(module, name), name))
    return names


def make(shapes, dtypes=(F32, F32), *, scalars=2, device="cpu", seed=0):
    """Inputs of Eq. 1 that require grad; every pair's mask drops another clip, the first pair's none.

    dtypes: of every student and teacher, or a list of that, taken in turn.
    """
    rng = torch.Generator().manual_seed(seed)
    turns = dtypes if isinstance(dtypes, list) else [dtypes]

    def leaf(shape, dtype):
        return torch.randn(shape, generator=rng).to(device, dtype).requires_grad_()

    students = [leaf(shape, turns[p % len(turns)][0]) for p, shape in enumerate(shapes)]
    teachers = [leaf(shape, turns[p % len(turns)][1]) for p, shape in enumerate(shapes)]
    masks = torch.ones(len(shapes), shapes[0][0] if shapes else 3, device=device)
    for p in range(1, len(shapes)):
        masks[p, p % masks.shape[1]] = 0
    weights, parts = (torch.rand(len(shapes) + scalars, generator=rng) for _ in range(2))
    divisors = (2 ** (6 * parts - 3)).to(device)
    return students, teachers, masks, weights.to(device), divisors, leaf((scalars,), F32)


def expected(students, teachers, masks, weights, divisors, scalars):
    """Total, values and gradients to students by loops over pairs and clips, in float64."""
    to_numpy = lambda x: x.detach().cpu().double().numpy()  # noqa: E731
    masks, weights, divisors = to_numpy(masks), to_numpy(weights), to_numpy(divisors)
    values, grads = [], []
    for p, (s, t) in enumerate(zip(students, teachers, strict=True)):
        s, t, value = to_numpy(s), to_numpy(t), 0.0
        grad, count = np.zeros_like(s), masks[p].sum()
        for n in np.flatnonzero(masks[p]):
            value += np.mean((s[n] - t[n]) ** 2) / count
            if weights[p] != 0:
                grad[n] = weights[p] / divisors[p] * 2 * (s[n] - t[n]) / s[n].size / count
        values.append(value)
        grads.append(grad)
    values = np.concatenate([values, to_numpy(scalars)]) / divisors
    total = sum(w * v for w, v in zip(weights, values, strict=True) if w != 0)
    return total, values, grads


def check(function, inputs, *, teacher_grad=False, upstream=3.0):
    """Outputs and every gradient of the function against ``expected``."""
    students, teachers, _, weights, divisors, scalars = inputs
    total, values = function(*inputs, teacher_grad=teacher_grad)
    want_total, want_values, want_grads = expected(*inputs)
    assert (total.dtype, total.shape, values.dtype) == (F32, (), F32)
    assert not values.requires_grad
    np.testing.assert_allclose(total.item(), want_total, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(values.cpu(), want_values, rtol=2e-6, atol=1e-6)
    (total * upstream).backward()
    for s, t, want in zip(students, teachers, want_grads, strict=True):
        for x, sign in ((s, 1), (t, -1)) if teacher_grad else ((s, 1),):
            assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
            size = max(np.abs(want).max() * upstream, 1e-30)
            got = x.grad.double().cpu().numpy() / size
            np.testing.assert_allclose(
                got, sign * upstream * want / size, rtol=0, atol=TOLERANCE[x.dtype]
            )
        assert teacher_grad or t.grad is None
    want = (weights / divisors)[len(students) :] * upstream
    torch.testing.assert_close(scalars.grad, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS, ids=["op", "reference"][: len(FUNCTIONS)])
@pytest.mark.parametrize("teacher_grad", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, F16), (BF16, F16)]
)
def test_odd_shapes_and_dtypes(function, dtypes, teacher_grad, device, poison):
    check(function, make(SHAPES, dtypes, device=device), teacher_grad=teacher_grad)
    if function is kernels.weighted_loss:
        assert poison, "nothing was allocated through the poisoned functions"


@pytest.mark.parametrize("function", FUNCTIONS, ids=["op", "reference"][: len(FUNCTIONS)])
@pytest.mark.parametrize("pairs, scalars", [(0, 3), (2, 0), (0, 0)])
def test_no_pairs_or_no_scalars(function, pairs, scalars, device):
    inputs = make(SHAPES[-pairs:] if pairs else [], scalars=scalars, device=device)
    if pairs or scalars:
        check(function, inputs)
    else:
        assert function(*inputs)[0].item() == 0.0


@pytest.mark.parametrize("teacher_grad", [False, True])
def test_mixed_dtypes_in_one_call(teacher_grad, device, poison):
    """Kinds of pairs side by side, with rows that are aligned for wide loads and rows that are not."""
    shapes = [*SHAPES, (3, 64), (3, 4, 8), (3, 2, 2, 2, 72), (3, 16), (3, 8)]
    check(kernels.weighted_loss, make(shapes, MIXED, device=device), teacher_grad=teacher_grad)


def test_many_pairs(device, poison):
    shapes = [(3, 5 + 7 * (p % 4)) for p in range(39)]
    check(kernels.weighted_loss, make(shapes, MIXED, scalars=70, device=device))


def test_one_pair_much_larger_than_the_others(device, poison):
    shapes = [(2, 3), (2, 13 * 401), (2, 1), (2, 40)]
    check(kernels.weighted_loss, make(shapes, [(F32, BF16), (BF16, BF16)], device=device))


def test_one_clip(device, poison):
    check(kernels.weighted_loss, make([(1, 700), (1, 3)], device=device))


def layouts(shape, device):
    """The same numbers under several strides."""
    x = torch.randn(shape, device=device)
    wide = torch.randn(*shape[:-1], 2 * shape[-1], device=device)
    wide[..., ::2] = x
    return {
        "contiguous": x,
        "channels_last_3d": x.contiguous(memory_format=torch.channels_last_3d),
        "every other column": wide[..., ::2],
        "clips innermost": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "expanded": x[:1].expand(shape),
    }


@pytest.mark.parametrize("function", FUNCTIONS, ids=["op", "reference"][: len(FUNCTIONS)])
@pytest.mark.parametrize("shape", [(3, 4, 3, 2, 5), (1, 3, 1, 2, 2)])
def test_any_strides(function, shape, device, poison):
    torch.manual_seed(0)
    sides = list(layouts(shape, device).values())
    pairs = [(s, t) for s in sides for t in reversed(sides)]
    students, teachers = zip(*pairs, strict=True)
    students = [s.detach().requires_grad_() for s in students]
    teachers = [(t * 1).detach() if t.stride(0) else t.detach() for t in teachers]
    masks = torch.ones(len(pairs), shape[0], device=device)
    masks[::2, -1] = 0
    weights = torch.rand(len(pairs), device=device)
    scalars = torch.zeros(0, device=device, requires_grad=True)
    divisors = torch.rand(len(pairs), device=device) + 0.5
    check(function, (students, teachers, masks, weights, divisors, scalars))


def test_gradient_keeps_channels_last(device):
    students, *others = make([(2, 4, 3, 2, 5)], device=device)
    student = students[0].detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    (grad,) = torch.autograd.grad(kernels.weighted_loss([student], *others)[0], student)
    assert grad.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("function", FUNCTIONS, ids=["op", "reference"][: len(FUNCTIONS)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_dropped_clip_may_hold_anything(function, dtype, device, poison):
    inputs = make(SHAPES, (dtype, dtype), device=device)
    students, teachers, masks, *_ = inputs
    masks[3] = 0
    with torch.no_grad():
        for p, n in (masks == 0).nonzero().tolist():
            students[p][n], teachers[p][n] = float("nan"), float("inf")
    check(function, inputs, teacher_grad=True)
    assert not students[3].grad.any() and not teachers[3].grad.any()
    assert function(*inputs)[1][3] == 0.0


@pytest.mark.parametrize("function", FUNCTIONS, ids=["op", "reference"][: len(FUNCTIONS)])
def test_weight_zero_is_valued_but_teaches_nothing(function, device, poison):
    inputs = make(SHAPES, device=device)
    students, _, _, weights, _, scalars = inputs
    weights[[2, 4, 7]] = 0
    check(function, inputs)
    assert not students[2].grad.any() and students[1].grad.any() and scalars.grad[1] == 0
    with torch.no_grad():
        students[4][0, 0, 0, 0, 0] = scalars[1] = float("nan")
    students[4].grad = None
    total, values = function(*inputs)
    total.backward()
    assert total.isfinite() and not students[4].grad.any()
    assert values[4].isnan() and values[7].isnan() and values[[0, 1, 2, 3, 5, 6]].isfinite().all()


def test_same_bits_twice(device):
    def run():
        inputs = make([(4, 500 if INTERPRETED else 3000), (4, 77), (4, 8, 4)], MIXED, device=device)
        total, values = kernels.weighted_loss(*inputs)
        return [total, values, *torch.autograd.grad(total, inputs[0])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("pairs", [0, 1, 9] if INTERPRETED else [0, 1, 9, 39])
def test_one_launch_over_the_activations(pairs, device, launches):
    if not (INTERPRETED or device == "cuda"):
        pytest.skip("no kernel on a CPU")
    inputs = make([(2, 3 + p) for p in range(pairs)], MIXED, device=device)
    total, _ = kernels.weighted_loss(*inputs)
    assert launches == ["pairs_kernel"] * (pairs > 0) + ["values_kernel"]
    launches.clear()
    total.backward()
    assert launches == ["scale_kernel"] * (pairs > 0)


@pytest.mark.parametrize("upstream", [1.0, 3.0, float("nan")])
def test_backward_needs_no_room_for_gradients(upstream, device, poison):
    """Once nothing reads them again, saved gradients are scaled where they lie, and not at all by 1."""
    if upstream != 1 and not (INTERPRETED or device == "cuda"):
        pytest.skip("a CPU scales out of place")
    inputs = make([(3, 500), (3, 64), (3, 700)], [(F32, F32), (BF16, BF16)], device=device)
    kept = torch.autograd.grad(kernels.weighted_loss(*inputs)[0], inputs[0])
    total, _ = kernels.weighted_loss(*inputs)
    poison.clear()
    given = torch.autograd.grad(total, inputs[0], torch.full_like(total, upstream))
    assert not {(3, 500), (3, 64), (3, 700)} & set(poison)
    for a, b in zip(given, kept, strict=True):
        want = (b.float() * upstream).to(b.dtype)
        tolerance = 8e-3 if INTERPRETED and b.dtype == BF16 else 0
        torch.testing.assert_close(a, want, rtol=tolerance, atol=0, equal_nan=True)


def test_more_than_a_launch_takes_is_named(device):
    if not (INTERPRETED or device == "cuda"):
        pytest.skip("no kernel on a CPU")
    with pytest.raises(ValueError, match=r"65 pairs.*the most that a kernel takes is 64"):
        kernels.weighted_loss(*make([(2, 3)] * 65, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_replayed_by_a_cuda_graph():
    inputs = make(SHAPES, MIXED, device="cuda")
    students, _, masks, weights, _, _ = inputs

    def step():
        total, values = kernels.weighted_loss(*inputs)
        return [total, values, *torch.autograd.grad(total, students)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for seed in (1, 2):
        with torch.no_grad():
            others = make(SHAPES, MIXED, device="cuda", seed=seed)[0]
            for x, y in zip(students, others, strict=True):
                x.copy_(y)
            weights[seed], masks[0, seed] = 0, 0
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, step(), strict=True))


@pytest.mark.parametrize("scale", [1, 5])
def test_a_retained_graph_can_be_walked_again(scale, device):
    """Saved gradients may be handed out as they are only once nothing reads them again."""
    inputs = make(SHAPES, device=device)
    total, _ = kernels.weighted_loss(*inputs)
    given = torch.autograd.grad(total * scale, inputs[0], retain_graph=True)
    once = [grad.clone() for grad in given]
    for grad in given:
        grad.zero_()  # the caller's own
    for last in (False, False, True):
        (total * scale).backward(retain_graph=not last)
    for s, grad in zip(inputs[0], once, strict=True):
        torch.testing.assert_close(s.grad, 3 * grad, rtol=1e-6, atol=0)


def test_a_large_loss_scale_saves_small_float16_gradients(device):
    inputs = make([(3, 500)], (F16, F16), scalars=0, device=device)
    inputs[3].fill_(1e-6)
    total, _ = kernels.weighted_loss(*inputs)
    (grad,) = torch.autograd.grad(total * 2.0**24, inputs[0])
    want = torch.from_numpy(expected(*inputs)[2][0]) * 2.0**24
    torch.testing.assert_close(grad.cpu().double(), want, rtol=2e-3, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds bfloat16 towards zero")
def test_a_bfloat16_gradient_is_not_scaled_by_a_rounded_number(device):
    inputs = make([(3, 500)], (BF16, BF16), scalars=0, device=device)
    (grad,) = torch.autograd.grad(kernels.weighted_loss(*inputs)[0] / 3, inputs[0])
    want = torch.from_numpy(expected(*inputs)[2][0]) / 3
    got = grad.cpu().double()
    # one third in bfloat16 is 0.2 % too large; roundings of single elements average out
    assert (got * want).sum() / want.square().sum() == pytest.approx(1, abs=5e-4)


def test_nothing_is_saved_without_grad(device, poison):
    inputs = make([(3, 500)], device=device)
    with torch.no_grad():
        total, _ = kernels.weighted_loss(*inputs)
    assert not total.requires_grad
    if INTERPRETED or device == "cuda":  # the CPU path needs room for the difference either way
        assert (3, 500) not in poison
    frozen = [x.detach() for x in inputs[0]]
    total, _ = kernels.weighted_loss(frozen, *inputs[1:5], inputs[5].detach())
    assert not total.requires_grad


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is too slow")
def test_a_large_clip_is_summed_accurately(device):
    s = torch.rand(1, 3_000_001, device=device) + 1
    t, masks, weights = torch.zeros_like(s), s.new_ones(1, 1), s.new_ones(1)
    _, values = kernels.weighted_loss([s], [t], masks, weights, weights, s.new_zeros(0))
    assert values.item() == pytest.approx(s.double().square().mean().item(), rel=3e-6)


@pytest.mark.skipif(INTERPRETED, reason="float64 has no kernel")
@pytest.mark.parametrize("function", FUNCTIONS, ids=["op", "reference"][: len(FUNCTIONS)])
def test_gradcheck(function):
    students, teachers, *constants, scalars = make([(3, 3), (3, 2, 1, 2, 1)])
    leaves = [x.detach().double().requires_grad_() for x in (*students, *teachers, scalars)]
    constants = [x.double() for x in constants]

    def total(*x):
        return function(x[:2], x[2:4], *constants, x[4], teacher_grad=True)[0]

    assert torch.autograd.gradcheck(total, leaves)


def test_opcheck(device):
    """With a total above 0: what opcheck sends back is its sign, by which gradients are scaled where they lie."""
    for shapes in (SHAPES[-3:], []):
        *others, scalars = make(shapes, device=device)
        scalars = scalars.detach().abs().requires_grad_()
        torch.library.opcheck(kernels._weighted_loss, (*others, scalars, True))
    channels_last = make([(2, 4, 3, 2, 5)], (BF16, BF16), scalars=0, device=device)
    x = channels_last[0][0].detach().contiguous(memory_format=torch.channels_last_3d)
    torch.library.opcheck(kernels._weighted_loss, ([x.requires_grad_()], *channels_last[1:], True))


def test_one_graph_for_all_weights(device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def step(x, teacher, *others):
        total, values = kernels.weighted_loss([x.relu(), x.sin()], [teacher] * 2, *others)
        return total * 2, values

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for seed in range(4):
        students, teachers, *_, scalars = make([(3, 63)], seed=seed, device=device)
        masks = (torch.rand(2, 3, device=device) > 0.3).float()
        weights = torch.rand(4, device=device) * (seed > 0)
        divisors = torch.rand(4, device=device) + 0.5
        x, inputs = students[0], (teachers[0].detach(), masks, weights, divisors, scalars)
        want, want_values = step(x, *inputs)
        got, values = compiled(x, *inputs)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(values, want_values)
        grads = [torch.autograd.grad(y, [x, scalars]) for y in (want, got)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a)
    assert counter.frame_count == 1, "changed weights or divisors compiled another graph"


def change(**changes):
    def apply(args):
        return {**args, **{k: v(args[k]) for k, v in changes.items()}}

    return apply


@pytest.mark.parametrize(
    "mistake, message",
    [
        (change(teachers=lambda x: x[:1]), "2 students but 1 teachers"),
        (change(masks=lambda x: x[:, :2]), "pair 0.*N = 2"),
        (change(masks=lambda x: x[0]), r"masks must be \(P, N\)"),
        (change(masks=lambda x: x[:, :0]), r"masks must be \(P, N\)"),
        (change(weights=lambda x: x[1:]), r"weights must be \(P \+ S,\) = \(4,\), not \(3,\)"),
        (change(divisors=lambda x: x[1:]), r"divisors must be \(P \+ S,\) = \(4,\), not \(3,\)"),
        (change(divisors=lambda x: x.double()), "divisors must be torch.float32 .*torch.float64"),
        (change(weights=lambda x: x.half()), "weights must be torch.float32 .*not torch.float16"),
        (change(masks=lambda x: x.bool()), "masks must be torch.float32 .*not torch.bool"),
        (change(scalars=lambda x: x.sum()), r"scalars must be \(S,\)"),
        (change(teachers=lambda x: [x[0], x[1][:, :1]]), "pair 1: student"),
        (change(students=lambda x: [x[0].int(), x[1]]), "pair 0: torch.int32"),
        (change(students=lambda x: [x[0].to("meta"), x[1]]), "pair 0: student is on meta"),
    ],
)
def test_mistakes_are_named(mistake, message):
    names = ("students", "teachers", "masks", "weights", "divisors", "scalars")
    args = dict(zip(names, make([(3, 4), (3, 5)]), strict=True))
    with pytest.raises(ValueError, match=message):
        kernels.weighted_loss(**mistake(args))


def test_triton_kernels_in_the_interpreter(interpret):
    interpret(__file__)
