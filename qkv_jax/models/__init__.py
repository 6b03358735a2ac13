"""Models: one file each, with its Config, presets and module."""
