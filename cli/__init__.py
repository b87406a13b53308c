"""The command line: parses, builds, shows. Nobody imports it."""
