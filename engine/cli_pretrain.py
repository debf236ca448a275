"""``engine pretrain``: train the representation with a given loss."""

from __future__ import annotations

from pathlib import Path

import click

from engine.cli_common import (
    PATH,
    errors_explained,
    open_run,
    run_options,
    say_rejects,
    say_substitutes,
)


@click.command()
@click.option(
    "--loss",
    "loss_name",
    metavar="FILE|PRESET|random:SEED",
    help="The loss, such as RUN/best.toml.",
)
@click.option(
    "--videos",
    multiple=True,
    type=PATH,
    required=True,
    help="Videos or shards; may be given again.",
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=1),
    default=500,
    show_default=True,
    help="In steps.",
)
@run_options
@errors_explained
def pretrain(
    loss_name: str | None,
    videos: tuple[Path, ...],
    checkpoint_every: int,
    recipe_name: str | None,
    assignments: tuple[str, ...],
    seed: int | None,
    run_path: Path | None,
    resume: bool,
    device: str,
) -> None:
    """Train the representation with a given loss; ends with the RGB network as RUN/rgb.safetensors."""
    from engine.data.library import default_shard_cache, open_library
    from engine.display import Display
    from engine.lossfile import load_loss
    from engine.pretrain import pretrain as train
    from engine.runtime import check_kernels_package, choose_runtime

    if loss_name is None and not resume:
        raise ValueError(
            "--loss is missing: a loss file such as RUN/best.toml, a preset, or random:SEED"
        )
    check_kernels_package()
    weights = load_loss(loss_name) if loss_name else None
    run, recipe = open_run("pretrain", recipe_name, assignments, seed, run_path, resume, "cpu")
    runtime = choose_runtime(device, amp=recipe.optim.amp)
    with Display(log=run.path) as display:
        library = open_library(videos, cache=default_shard_cache(), report=display.prepare)
        say_rejects(display, library)
        out = train(
            recipe,
            library,
            weights=weights,
            run=run,
            runtime=runtime,
            display=display,
            checkpoint_every=checkpoint_every,
        )
        say_substitutes(display, library)
    click.echo(f"RGB network: {out}")
