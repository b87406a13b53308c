"""Settings, registry, errors and the cache directory. Imports nothing of ours and no torch."""
