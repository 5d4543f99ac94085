"""Kernels, one backend a file."""
