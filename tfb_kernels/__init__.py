"""Kernels for Bayesian low-rank adapters: they know tensors, not models.

See :func:`bayes_lora_linear` for the operation and :mod:`tfb_kernels.noise` for the noise
contract. Importing this package needs neither a GPU nor Triton.
"""

from tfb_kernels.noise import NOISE_VERSION
from tfb_kernels.ops import (
    ImplementationUnavailableError,
    bayes_lora_linear,
    bayes_lora_merge,
    gaussian_noise,
    predictive_reduction,
)

__all__ = [
    "NOISE_VERSION",
    "ImplementationUnavailableError",
    "bayes_lora_linear",
    "bayes_lora_merge",
    "gaussian_noise",
    "predictive_reduction",
]
