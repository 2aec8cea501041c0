"""Launcher for a checkout: `python cli.py run depth-sweep` is `gradlab run depth-sweep`."""

from gradlab.cli import main

if __name__ == "__main__":
    main(prog_name="gradlab")
