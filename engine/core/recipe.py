"""Recipes: frozen, typed sections read from TOML, each handed to the component that uses it.

A recipe names what is run and with which numbers. Unknown keys, wrong types and values out of range are
errors that name the key; nothing is guessed. ``recipe_hash`` identifies a recipe wherever a number is written.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
import tomli_w
from msgspec import Meta, Struct

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Meta(gt=0.0)]
Readout = Literal["raw", "unit", "zscore", "white"]
Strides = tuple[Positive, Positive, Positive, Positive, Positive]


class Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A section of a recipe; its fields' types and ranges are checked on reading."""


class Clip(Section, frozen=True):
    """Training clips: T input frames, P future frames, and how they are cut."""

    num_frames: Annotated[int, Meta(ge=2)] = 8
    num_future_frames: Annotated[int, Meta(ge=2)] = 4
    frame_stride: Positive = 2
    size: Annotated[int, Meta(ge=16)] = 64
    """Side in pixels of the square crop."""
    min_area: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.5
    """Smallest share of the frame's area that a training crop covers."""
    flip: bool = True
    shuffle_shards: Natural = 0
    """Shards that clips are drawn from at a time, for disks that are slow at random reads; 0: from all of them."""
    flow: Literal["fast", "fine", "best"] = "fine"
    """Quality of a CPU's optical flow; ``engine.data.flow`` has errors and costs. A GPU's engine ignores it."""


class Audio(Section, frozen=True):
    """Log-mel features of the sound that goes with a clip."""

    sample_rate: Positive = 16000
    num_mels: Positive = 40
    fft_size: Positive = 512
    hop: Positive = 256
    min_shift: PositiveFloat = 0.5
    """Least shift in seconds of the misaligned sound."""


class Model(Section, frozen=True):
    """The networks, one per modality, all of one depth and width."""

    arch: Literal["r3d_18", "r3d_34", "r3d_50", "r2plus1d_18", "r2plus1d_50"] = "r3d_18"
    width: PositiveFloat = 1.0
    """Factor on the channels (64 in the stem at 1.0)."""
    pool: bool = False
    """Halve time and space again after the stem."""
    depths: tuple[Positive, ...] = ()
    """Residual blocks in each of the four stages; none: as many as ``arch`` has."""
    time_strides: Strides = (1, 1, 2, 2, 2)
    """Divisors of the number of frames, of the stem and the four stages."""
    space_strides: Strides = (2, 1, 2, 2, 2)
    """Likewise of height and width, and of the sound's frames and mels."""
    stem_size: Literal[3, 5, 7] = 7
    """Height and width of the stem's kernel, in the networks that see videos."""
    motion_stem: Share = 0.0
    """Share of the stem's channels, in the networks that see pictures, whose kernels start with no mean over time."""


class Objective(Section, frozen=True):
    """Settings that the terms of Eq. 1 share."""

    stop_gradient: bool = True
    """Stop the gradient of the distillation target."""
    units: Literal["chance", "gradient", "raw"] = "chance"
    """chance: each term is divided by what comes of no learning on the same batch, so that 1 is nothing and 0 all that
    can be learnt; gradient: its weight is divided by the size of its gradient at the start, too, so that equal weights
    pull the networks equally; raw: as it is (the paper does not say)."""
    distill: Literal["l2", "standardised", "projected"] = "l2"
    """The activations compared: as they are (the paper), standardised ones, or a linear map of RGB's with those."""
    margin: PositiveFloat = 0.5
    embed_dim: Positive = 64
    decoder: Literal["linear", "convolutional"] = "linear"
    """linear: what is decoded has to be in stage 4 linearly, and teaches from the first steps on; convolutional: three
    layers of ``decoder_width`` channels, which learn to decode before the network learns."""
    decoder_width: Positive = 32
    decoder_downscale: Positive = 4
    """Decoders give frames at the clip's size divided by this."""
    order_share: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    """Share of the batch whose shuffled (and, again, reversed) copies enter the networks."""


class Optim(Section, frozen=True):
    """Optimizer and schedule: linear warm-up, then down to zero."""

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    """muon: convolutions' steps orthogonalised, AdamW for the rest; more is learnt in few steps (engine.train.muon)."""
    lr: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Meta(ge=0.0)] = 0.05
    momentum: Share = 0.9
    """SGD's and Muon's momentum."""
    steps: Positive = 150
    warmup_steps: Natural = 15
    schedule: Literal["cosine", "trapezoid"] = "cosine"
    """trapezoid: the rate stays up, and falls linearly over the last 40 % of the steps: more is learnt in few steps."""
    batch_size: Annotated[int, Meta(ge=2)] = 16
    """Clips of a step, whatever the number of processes and of micro-batches that share them."""
    grad_clip: PositiveFloat = 1.0
    """Largest norm of the gradient."""
    accumulate: Positive = 1
    """Micro-batches of a step, one after another, to save memory; negatives, mean pictures, the unit of chance and
    batch norm's statistics then come from one micro-batch (of all processes)."""
    batch_norm: Literal["local", "sync", "frozen"] = "local"
    """Statistics of each process's share of the batch, of the whole batch, or the running ones, unchanged."""
    ema: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """``engine pretrain``: decay of the RGB network's running average, which is then what is written; 0: none."""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """auto: bf16 on a GPU, float32 on a CPU."""
    compile: Literal["auto", "off", "default", "reduce-overhead"] = "auto"
    """torch.compile's mode for the step; reduce-overhead adds CUDA graphs. auto: on a GPU reduce-overhead, or default
    with several processes or micro-batches; off on a CPU."""


class Fitness(Section, frozen=True):
    """K-means on the RGB network's features: agreement with labelled clips' classes, or Zipf's law without."""

    metric: Literal["hungarian", "nmi", "ari", "zipf"] = "hungarian"
    num_clusters: Natural = 0
    """Clusters; 0: as many as there are classes. Clips without labels (metric "zipf") need a number."""
    zipf_exponent: PositiveFloat = 1.0
    """Zipf's s: the i-th largest cluster is to weigh i^-s."""
    max_clips: Natural = 0
    """Most clips to judge by, drawn with the recipe's seed; 0: all that have labels, 2000 where none has."""
    views_per_clip: Positive = 2
    """Views in time, evenly spread over a clip, whose features are averaged."""
    readout: Readout = "unit"
    """Scaling of features before they are clustered; ``engine.features.readout`` describes each."""
    kmeans_init: Positive = 10
    """K-means starts per run; the one with the least inertia counts."""
    kmeans_seeds: Positive = 3
    """K-means runs whose agreements are averaged."""
    kmeans: Literal["auto", "sklearn", "cuml", "batched"] = "auto"
    """Whose k-means: scikit-learn's, cuML's, or the engine's own, which clusters a cohort at once; auto: by device."""
    batch_norm: Literal["batch", "running"] = "batch"
    """Statistics of batch norm while features are taken: of the labelled batch, or the running ones."""
    batch_size: Annotated[int, Meta(ge=4)] = 32

    @property
    def uses_labels(self) -> bool:
        """Whether labels decide the fitness."""
        return self.metric != "zipf"

    def clusters_for(self, num_classes: int) -> int:
        """The number of clusters for k-means, for 0 classes without labels; raises ValueError that says what to set."""
        if num_classes == 0 and self.uses_labels:
            raise ValueError(
                f'fitness.metric "{self.metric}" needs labelled clips: give some with --labelled, '
                "or judge without labels by --set fitness.metric=zipf"
            )
        clusters = self.num_clusters or num_classes
        if clusters < 2:
            raise ValueError(
                "clips without labels have no number of classes: set fitness.num_clusters (2 or more)"
            )
        return clusters


class Search(Section, frozen=True):
    """The search: how losses are proposed, and how members are trained."""

    method: Literal["evolution", "cmaes", "surrogate", "random", "grid"] = "evolution"
    """``engine.search.samplers`` describes them."""
    population: Annotated[int, Meta(ge=2)] = 12
    rounds: Natural = 12
    """Members evaluated after the initial population, whatever the method; the paper runs 2000."""
    tournament: Positive = 4
    generation: Positive = 4
    """Members proposed at once and trained on the same decoded batches."""
    replace: Literal["worst", "oldest"] = "oldest"
    synchronous: bool = True
    """Propose a generation once all earlier ones are done, so that the same members come whatever the number of
    workers and kills. False: propose whenever a worker is free, from whatever is done by then; no worker waits."""
    sigma: PositiveFloat = 0.3
    """cmaes: standard deviation of the first generation's weights around 0.5."""
    cmaes_population: Natural = 0
    """cmaes: members of a generation; 0: 4 + 3 ln(39), which is 14."""
    sparsity: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Probability that a drawn weight is exactly 0 (cmaes and grid: no use is made of it): members get cheaper, and
    losses differ more. 0: the paper's prior, uniform in [0, 1)."""
    levels: Positive = 2
    """grid: weights that a term may have, evenly spaced, up to 1."""
    repeats: Positive = 1
    """Trainings per member, with different seeds, whose fitnesses are averaged."""
    seeds: Literal["same", "generation"] = "same"
    """same: members start from equal networks and see equal batches, so that fitnesses differ by losses alone;
    generation: each generation has its own, lest losses be found that are good for one start alone."""
    confirm_seeds: Annotated[int, Meta(ge=0)] = 3
    """Fresh seeds with which the best and random losses are trained again at the end."""
    confirm_random: Positive = 1
    """Random losses under each of them, whose mean is what a seed gives: of sparse ones, some teach by luck."""
    compare: tuple[str, ...] = ()
    """Losses trained with the same fresh seeds beside them, names of presets or files: all with the first, and the
    one that is the fittest then with the others."""
    halving: bool = False
    """Drop the worse half of a cohort at 1/4 and again at 1/2 of the steps (successive halving): 0.56 of the time.
    docs/search.md says what this and the next settings save, and at what price."""
    warm_start: bool = False
    """Start a member's networks from its parent's end state: 0.52 of the time at half of the steps."""
    warm_start_steps: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.5
    """Share of the steps, the last ones, that a member with such a start is trained for."""
    collapse_rank: Annotated[float, Meta(ge=0.0)] = 0.0
    """Drop a member whose features' effective rank is below this at 1/4 of the steps; 0: never. Costs nothing
    that could be measured."""
    clip_bank: Natural | Annotated[str, Meta(pattern=r"^\d+(\.\d+)? ?[KMGT]i?B$")] = 0
    """Train on this many clips, or as many as fit a size such as "2GiB", kept decoded; 0: on all, decoded each time.
    A batch then costs a fifth: much where input holds up the step, 0.98 of the time in a cohort of eight on a CPU."""


class Evaluation(Section, frozen=True):
    """Evaluation of frozen networks: how their features are extracted and judged."""

    views: Positive = 10
    """Views in time, evenly spread over a clip."""
    crops: Literal[1, 3] = 1
    """Squares of each view: the central one, or both ends of the longer side as well."""
    batch_norm: Literal["running", "batch"] = "running"
    """Statistics of batch norm: those of training, or of batches that mix all classes (they see test clips)."""
    batch_size: Annotated[int, Meta(ge=2)] = 32
    readout: Readout = "unit"
    """Scaling of features before k-means, as in ``[fitness]``."""
    kmeans_init: Positive = 10
    kmeans_seeds: Annotated[int, Meta(ge=1, le=100)] = 10
    examples: Literal["views", "videos"] = "views"
    """What the linear layer is fitted to: every view, the mean softmax of a video's views being its scores; or means
    over a video's views. With few videos views are much better; they take so many times as long."""
    strengths: tuple[PositiveFloat, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    """The linear layer's C, inverse to its regularisation, to choose from on held-out train groups."""
    holdout_parts: Annotated[int, Meta(ge=2)] = 4
    """Parts of train, by group; ``holdout_turns`` of them are held out, one after the other, to choose C."""
    holdout_turns: Positive = 4


class Finetune(Section, frozen=True):
    """Training with labels: the whole network with a new layer on top, or (``linear``) that layer alone."""

    protocol: Literal["finetune", "linear"] = "finetune"
    dataset: str = ""
    """The data set that the recipe is for, by name; empty: any."""
    num_classes: Natural = 0
    """Its classes; 0: as many as there are."""
    init: Literal["checkpoint", "scratch"] = "checkpoint"
    head_lr: PositiveFloat = 10.0
    """The new layer's learning rate, as a multiple of ``optim.lr``."""
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.5
    label_smoothing: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    validation: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """Share of train, by group, that is held out and scored beside test."""
    views: Positive = 10
    """Clips of a test video, evenly spread over it."""
    crops: Literal[1, 3] = 3


class Recipe(Section, frozen=True):
    """Everything that decides a run's numbers, apart from the videos."""

    name: str = "custom"
    seed: Natural = 0
    clip: Clip = Clip()
    audio: Audio = Audio()
    model: Model = Model()
    objective: Objective = Objective()
    optim: Optim = Optim()
    fitness: Fitness = Fitness()
    search: Search = Search()
    evaluation: Evaluation = Evaluation()
    finetune: Finetune = Finetune()


class RecipeError(ValueError):
    """A recipe that can't be used: the message names the file and the key."""


def preset_names(folder: str = "") -> list[str]:
    """Names of the recipes (or, with ``losses``, of the losses) that come with the package.

    A recipe in a folder goes by both names, such as ``paper/evolve``.
    """
    root = files("recipes").joinpath(folder)
    names = [p.name for p in root.iterdir()]
    if not folder:
        inside = (p for p in root.iterdir() if p.is_dir() and p.name not in ("losses", "reproduce"))
        names += [f"{p.name}/{each.name}" for p in inside for each in p.iterdir()]
    return sorted(name[:-5] for name in names if name.endswith(".toml"))


def preset_text(name: str, folder: str = "") -> str:
    """The text of a recipe (or, with ``losses``, of a loss) that comes with the package."""
    return files("recipes").joinpath(folder, f"{name}.toml").read_text(encoding="utf-8")


def recipe_named(name: str) -> str:
    """The text of a recipe or loss that comes along, or of a file; raises RecipeError with the nearest known name."""
    loss = name.removeprefix("losses/")
    if loss in preset_names("losses"):
        return preset_text(loss, "losses")
    return _text_of(name, "")[0]


def read_toml(name_or_path: str | Path, *, folder: str) -> tuple[dict[str, Any], str]:
    """The values of a TOML file, or of one of ``recipes/folder`` by its name; and what to call it in messages.

    Raises RecipeError for a name or file that is not there, and for text that does not parse.
    """
    text, where = _text_of(name_or_path, folder)
    try:
        return tomllib.loads(text), where
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where}: not valid TOML: {error}") from None


def _text_of(name_or_path: str | Path, folder: str) -> tuple[str, str]:
    path = Path(name_or_path)
    name = str(name_or_path)
    kind = {"": "recipe", "losses": "loss"}.get(folder, "scale")
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), name
        except UnicodeDecodeError:
            raise RecipeError(f"{kind} {name}: not a text file in UTF-8") from None
    known = preset_names(folder)
    if name in known:
        return preset_text(name, folder), f"{kind} {name!r}"
    if path.suffix == ".toml" or path.is_absolute():
        raise RecipeError(f"{kind} {name}: no such file")
    near = [n for n in known if n.startswith(f"{name}/")] or get_close_matches(name, known, n=1)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    raise RecipeError(f"{kind} {name!r} is neither a file nor a preset; {hint}")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe from a TOML file, or by the name of one that comes with the package (``demo``, ``cpu/evolve``).

    Raises RecipeError for a missing file, TOML that does not parse, an unknown key, a wrong type or a value
    out of range; the message names file and key, and the nearest known key.
    """
    values, where = read_toml(name_or_path, folder="")
    return recipe_from(values, where=where)


def recipe_from(values: dict[str, Any], *, where: str) -> Recipe:
    """Check a nested dict against the recipe's types; raises RecipeError as ``load_recipe`` does."""
    try:
        recipe = msgspec.convert(values, Recipe)
    except msgspec.ValidationError as error:
        reason, _, key = str(error).partition(" - at `$.")
        raise RecipeError(f"{where}: {_explained(reason, key.rstrip('`'))}") from None
    warmup, steps = recipe.optim.warmup_steps, recipe.optim.steps
    if warmup >= steps:
        raise RecipeError(
            f"{where}: optim.warmup_steps must be less than optim.steps, and is {warmup} of {steps}: set it too, such"
            f" as optim.warmup_steps={steps // 10}"
        )
    if recipe.optim.batch_size % recipe.optim.accumulate:
        raise RecipeError(f"{where}: optim.batch_size must be a multiple of optim.accumulate")
    return recipe


def _explained(reason: str, key: str) -> str:
    """msgspec's reason for refusing a key's value, with the keys or values that there are."""
    kind: Any = Recipe
    for name in filter(None, key.split(".")):
        kind = get_type_hints(kind).get(name)
    if unknown := re.fullmatch(r"Object contains unknown field `(.+)`", reason):
        path, known = f"{key}." if key else "", kind.__struct_fields__
        near = get_close_matches(unknown[1], known, n=1)
        hint = f"did you mean {path}{near[0]}?" if near else f"known: {', '.join(known)}"
        return f"unknown key {path}{unknown[1]}; {hint}"
    if reason.startswith("Invalid enum value"):
        reason += f"; there are {', '.join(map(str, get_args(kind)))}"
    return f"{key or 'recipe'}: {reason}"


def override(recipe: Recipe, assignments: list[str]) -> Recipe:
    """Apply ``section.key=value`` assignments, values in TOML's syntax (a bare word is a string)."""
    return recipe_from(assigned(msgspec.to_builtins(recipe), assignments), where="--set")


def assigned(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Nested ``values`` with ``section.key=value`` assignments put in."""
    for assignment in assignments:
        key, sign, text = assignment.partition("=")
        if not sign:
            raise RecipeError(f"--set {assignment}: write section.key=value")
        try:
            value = tomllib.loads(f"value = {text.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        *sections, last = key.strip().split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise RecipeError(f"--set {assignment}: {section!r} is not a section")
        target[last] = value
    return values


def to_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML, defaults included."""
    return tomli_w.dumps(msgspec.to_builtins(recipe))


def recipe_hash(recipe: Recipe) -> str:
    """Twelve hex digits that identify a recipe's values, but for its name and its rounds: a search may go on."""
    values = msgspec.to_builtins(recipe)
    values.pop("name")
    values["search"].pop("rounds")
    return hashlib.sha256(msgspec.json.encode(values, order="sorted")).hexdigest()[:12]
