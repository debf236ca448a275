"""The term table against the design's, written out by hand."""

import math

import pytest

from engine.objective.terms import (
    BY_NAME,
    TERM_NAMES,
    TERMS,
    check_weights,
)

R, G, F, A = "rgb", "grey", "flow", "audio"
# name: (code in Fig. 7's manner, networks read)
WRITTEN_OUT = {
    "rgb/shuffle": ("RS", {R}),
    "grey/shuffle": ("GS", {G}),
    "flow/shuffle": ("FS", {F}),
    "rgb/backward": ("RB", {R}),
    "grey/backward": ("GB", {G}),
    "flow/backward": ("FB", {F}),
    "rgb/align_audio": ("RA", {R, A}),
    "grey/align_audio": ("GA", {G, A}),
    "flow/align_audio": ("FA", {F, A}),
    "rgb/predict": ("RP", {R}),
    "grey/predict": ("GP", {G}),
    "flow/predict": ("FP", {F}),
    "audio/predict": ("AP", {A}),
    "rgb/reconstruct": ("RR", {R}),
    "grey/reconstruct": ("GR", {G}),
    "flow/reconstruct": ("FR", {F}),
    "audio/reconstruct": ("AR", {A}),
    "grey/colorize": ("GC", {G}),
    "rgb/to_flow": ("RX", {R}),
    "grey/to_flow": ("GX", {G}),
    "flow/to_rgb": ("FX", {F}),
    "rgb+grey/embed": ("GE", {R, G}),
    "rgb+flow/embed": ("FE", {R, F}),
    "rgb+audio/embed": ("AE", {R, A}),
    "distill/grey@0": ("GD0", {R, G}),
    "distill/grey@1": ("GD1", {R, G}),
    "distill/grey@2": ("GD2", {R, G}),
    "distill/grey@3": ("GD3", {R, G}),
    "distill/grey@4": ("GD4", {R, G}),
    "distill/flow@0": ("FD0", {R, F}),
    "distill/flow@1": ("FD1", {R, F}),
    "distill/flow@2": ("FD2", {R, F}),
    "distill/flow@3": ("FD3", {R, F}),
    "distill/flow@4": ("FD4", {R, F}),
    "distill/audio@0": ("AD0", {R, A}),
    "distill/audio@1": ("AD1", {R, A}),
    "distill/audio@2": ("AD2", {R, A}),
    "distill/audio@3": ("AD3", {R, A}),
    "distill/audio@4": ("AD4", {R, A}),
}


def test_the_table_has_the_39_terms_with_their_letters_and_networks() -> None:
    assert len(TERMS) == 39
    assert {t.name: (t.code, set(t.networks)) for t in TERMS} == WRITTEN_OUT
    assert TERM_NAMES == tuple(t.name for t in TERMS)
    assert all(BY_NAME[name].name == name for name in TERM_NAMES)
    assert len({t.code for t in TERMS}) == 39, "codes label a heatmap's cells"


def test_only_distillation_has_layers() -> None:
    layers = {t.name: t.layer for t in TERMS if t.layer is not None}
    assert layers == {n: int(n[-1]) for n in WRITTEN_OUT if n.startswith("distill/")}


def test_absent_weights_become_zero() -> None:
    weights = check_weights({"rgb/predict": 1, "distill/flow@3": 0.25})
    assert tuple(weights) == TERM_NAMES
    assert {n: w for n, w in weights.items() if w} == {"rgb/predict": 1.0, "distill/flow@3": 0.25}
    assert all(type(w) is float for w in weights.values())


@pytest.mark.parametrize("value", [-1e-9, 1.0000001, math.nan, math.inf, "0.5", None, True, [0.5]])
def test_a_bad_weight_is_refused_by_its_name(value) -> None:
    with pytest.raises(ValueError, match=r"^best\.toml: .*rgb/to_flow"):
        check_weights({"rgb/predict": 0.5, "rgb/to_flow": value}, where="best.toml")


def test_an_unknown_term_is_refused_with_the_nearest_known() -> None:
    with pytest.raises(ValueError, match=r"unknown loss term 'distil/flow@3'.*'distill/flow@3'"):
        check_weights({"distil/flow@3": 0.5})
