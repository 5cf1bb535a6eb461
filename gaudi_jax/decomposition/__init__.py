"""Dense kernels as structured ones under a budget of multiplications."""

from gaudi_jax.decomposition.decompose import Factors, decompose, relative_error
from gaudi_jax.decomposition.low_rank import svd_factors
from gaudi_jax.decomposition.spread import spread

__all__ = ["Factors", "decompose", "relative_error", "spread", "svd_factors"]
