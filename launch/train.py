"""`neuroada train` as a script, for a launcher: deepspeed launch/train.py --recipe llama13b_math."""

from neuroada.cli.main import script

if __name__ == "__main__":
    script("train")
