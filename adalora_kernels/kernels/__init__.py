"""Triton kernels, and recipes of launches. Importing this needs triton, and nothing of ours."""
