"""The commands of the command line, a module each: `EXAMPLE`, `add_arguments(parser)` and `run(args) -> int`."""
