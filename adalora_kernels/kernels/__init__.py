"""Triton kernels and their launchers. Importing this package needs triton, and nothing of ours."""
