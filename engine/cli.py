"""The ``engine`` command: parse, call, print."""

from __future__ import annotations

import warnings

import click

import engine
from engine.cli_bench import bench
from engine.cli_common import errors_explained
from engine.cli_evaluate import evaluate, finetune
from engine.cli_evolve import evolve
from engine.cli_ingest import ingest
from engine.cli_pretrain import pretrain
from engine.cli_recipes import recipes
from engine.cli_report import report, runs
from engine.cli_reproduce import reproduce
from engine.cli_use import embed, export


@click.group()
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
    from engine.display import Display, table
    from engine.doctor import diagnose

    display = Display()
    display.console.print(table("", ["part", "found", "path taken"], diagnose()))
