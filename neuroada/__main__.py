"""`python -m neuroada COMMAND ...`, for launchers: torchrun --nproc-per-node 8 -m neuroada train --recipe ..."""

from neuroada.cli.main import main

if __name__ == "__main__":
    main()
