"""``python -m engine``: the ``engine`` command, as ``torchrun -m engine`` starts it."""

from engine.cli import main

if __name__ == "__main__":
    main(prog_name="engine")
