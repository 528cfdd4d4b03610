"""The ops by plans of mhc-core, on tensors of any device whose host launches kernels.

``kernels.py`` has the ops, their gradients and operators, ``replay.py`` runs a plan on tensors, and
``host.py`` says what a host brings: ``mhc_torch.cuda`` and ``mhc_torch.metal`` have one each.
"""
