"""Settings, registry, errors and the cache directory. Imports nothing of ours and no torch."""

__version__ = "0.1.0"
