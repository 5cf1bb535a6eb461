"""Products that XLA does not have, as kernels for accelerators."""
