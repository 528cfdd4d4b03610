"""The adapters: a module per project, each with ``PEERS``."""
