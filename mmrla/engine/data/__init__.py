"""The datasets of a config or a folder, and their checks."""
