"""`neuroada select` as a script; select.py would shadow a standard module."""

from neuroada.cli.main import script

if __name__ == "__main__":
    script("select")
