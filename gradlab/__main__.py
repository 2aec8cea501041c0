"""`python -m gradlab` is the command `gradlab`."""

from gradlab.cli import main

if __name__ == "__main__":
    main(prog_name="gradlab")
