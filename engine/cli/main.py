"""The ``engine`` command: parse, call, print."""

from __future__ import annotations

import warnings

import click

import engine
from engine.cli.bench import bench
from engine.cli.common import errors_explained
from engine.cli.evaluate import evaluate, finetune
from engine.cli.evolve import evolve
from engine.cli.ingest import ingest
from engine.cli.pretrain import pretrain
from engine.cli.recipes import recipes
from engine.cli.report import report, runs
from engine.cli.reproduce import reproduce
from engine.cli.use import embed, export


@click.group(context_settings={"show_default": True})
@click.version_option(engine.__version__)
def main() -> None:
    """Learn video representations from unlabelled video, and evolve the loss that learns them."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|torchaudio")


COMMANDS = (ingest, evolve, pretrain, evaluate, finetune, embed, export)
for command in (*COMMANDS, reproduce, recipes, report, runs, bench):
    main.add_command(command)


@main.command()
@errors_explained
def doctor() -> None:
    """Say what this machine has, and which path each stage will take."""
    from engine.cli.doctor import diagnose
    from engine.core.display import Display, table

    display = Display()
    display.console.print(table("", ["part", "found", "path taken"], diagnose()))
