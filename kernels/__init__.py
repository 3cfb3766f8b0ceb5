"""kernels placeholder docstring."""
