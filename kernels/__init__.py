"""The ops of the engine, behind one seam: the same names and signatures as `soflow.kernels.reference`.

A network takes either namespace as its argument `ops`. No fused kernel exists yet, so both are the reference.
"""

from soflow.kernels.reference import *  # noqa: F403
from soflow.kernels.reference import __all__ as __all__
