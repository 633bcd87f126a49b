"""Commands of the ``mmrla`` program; each module has ``main(argv) -> int``."""
