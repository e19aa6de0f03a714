"""Star Attention inference for Megatron-core (arXiv 2411.17116)."""

import warnings

__version__ = "0.1.0"

# Importing Megatron-core warns five times that training helpers of Transformer Engine and Apex are absent. None of
# them is used in inference; which kernels are used is reported by the engine itself.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed", category=UserWarning)
warnings.filterwarnings("ignore", message="Apex is not installed. Falling back to Torch Norm", category=UserWarning)
