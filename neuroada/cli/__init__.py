"""The command line: one file a command, each with `main(argv)`. launch/ holds scripts over the same commands."""
