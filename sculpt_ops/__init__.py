"""Full fine-tuning in protected subspaces: fused projection ops, protecting bases, an optimizer that keeps to them.

The low-level ops are ``torch.ops.sculpt.*``; importing this package registers them.
"""

from .ops import foreach_project_, orthonormalize, project, project_, restore_, rsvd
from .optim import AdamW
from .ranks import Energy, Rank
from .subspaces import Subspaces

__all__ = [
    "AdamW",
    "Energy",
    "Rank",
    "Subspaces",
    "foreach_project_",
    "orthonormalize",
    "project",
    "project_",
    "restore_",
    "rsvd",
]
__version__ = "0.1.0"
