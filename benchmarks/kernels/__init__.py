"""One layer and the kernels beneath it."""
