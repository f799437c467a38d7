"""Full fine-tuning in protected subspaces: projection and decomposition ops, protecting bases, an optimizer that keeps
to them.

The low-level ops are ``torch.ops.sculpt.*``; importing this package registers them.
"""

from .decompose import top_subspace
from .on_dtensor_import import register_rules as _register_rules
from .ops import foreach_project_, orthonormalize, project, project_, restore_, rsvd, sketch
from .optim import AdamW, fuse_into_backward
from .ranks import Energy, Importance, Rank, Schedule
from .remember import Remember, RememberInputs
from .subspaces import Subspaces

__all__ = [
    "AdamW",
    "Energy",
    "Importance",
    "Rank",
    "Remember",
    "RememberInputs",
    "Schedule",
    "Subspaces",
    "foreach_project_",
    "fuse_into_backward",
    "orthonormalize",
    "project",
    "project_",
    "restore_",
    "rsvd",
    "sketch",
    "top_subspace",
]
__version__ = "0.1.0"

_register_rules()
