"""A run of ``mmrla train`` and ``mmrla test``: its config, checks, runner and hooks."""
