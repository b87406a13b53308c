"""The embedded default model: its files, its corpora and the script that trained it."""
