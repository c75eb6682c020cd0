"""The ops of the engine, behind one seam: the same names and signatures as `soflow.kernels.reference`.

Fused Triton kernels where there are any, the reference elsewhere: matrix products, convolutions, attention of many
tokens and the few numbers of a time embedding are left to PyTorch. On CPU tensors every op is its reference; where
Triton is not installed (CPU builds of PyTorch) the whole namespace is.
"""

from importlib.util import find_spec

from soflow.kernels.reference import *
from soflow.kernels.reference import __all__ as __all__

if find_spec("triton") is not None:
    from soflow.kernels.activation import gelu, gelu_difference, silu, silu_difference
    from soflow.kernels.adaln import gate_residual_norm, modulated_norm
    from soflow.kernels.adaln_pair import gate_residual_norm_difference, modulated_norm_difference
    from soflow.kernels.attention_pair import attention_difference
    from soflow.kernels.loss import solution_loss
    from soflow.kernels.point import draw, interpolate, look_ahead, normal, uniform
    from soflow.kernels.self_attention import attention
