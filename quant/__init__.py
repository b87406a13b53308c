"""Quantization: which layers get which numbers, how these are stored and computed with."""
