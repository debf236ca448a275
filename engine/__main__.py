"""``python -m engine``: the ``engine`` command, as ``torchrun -m engine`` starts it."""

from engine.cli.main import main

if __name__ == "__main__":
    main(prog_name="engine")
