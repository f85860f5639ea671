"""What a recipe can train: one file a method, NeuroAda among them, all by the same loop, data, scoring and report."""

from neuroada.methods.base import Method, make_method

__all__ = ["Method", "make_method"]
