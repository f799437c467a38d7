"""More than one GPU: the ops on DTensors, subspaces and optimizer states that are sharded as the weights are.

Not imported by `import sculpt_ops`: it needs `torch.distributed.tensor`, which takes longer to import than everything
else here. `sculpt_ops.on_dtensor_import` brings the rules of the ops in once a program imports that module itself.
"""

# Before any module of this package, for it imports the rules of the ops: from the middle of one of them that failed.
import torch.distributed.tensor  # noqa: F401
