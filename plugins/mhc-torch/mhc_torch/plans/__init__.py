"""The ops by plans of mhc-core, on tensors of any device whose host launches kernels.

``kernels.py`` has the ops, their gradients and operators, ``channels.py`` those on parts of the
channels, ``replay.py`` runs a plan on tensors, and ``host.py`` says what a host brings:
``mhc_torch.cuda`` and ``mhc_torch.metal`` have one each.
"""
