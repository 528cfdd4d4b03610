"""The built library of mhc-core's backend jax-cuda, ``cuda.so``, which that backend finds here."""
