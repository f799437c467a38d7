"""More than one GPU: the ops on DTensors, subspaces and optimizer states that are sharded as the weights are.

Not imported by `import sculpt_ops`: it needs `torch.distributed.tensor`, which takes longer to import than everything
else here. `sculpt_ops.on_dtensor_import` brings the rules of the ops in once a program imports that module itself.
"""
