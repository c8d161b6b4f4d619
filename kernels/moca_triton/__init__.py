"""Triton kernels of the ops, one file an op; compiled when first called."""
