"""The model: architecture, weights, tokenizers, devices. Knows configs; knows nothing of generating."""
