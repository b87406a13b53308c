"""Sequences in, tokens and text out: scheduling, sampling, stepping, compiling.

Sees the model's call, never its weights' origin.
"""
