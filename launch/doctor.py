"""`neuroada doctor` as a script."""

from neuroada.cli.main import script

if __name__ == "__main__":
    script("doctor")
