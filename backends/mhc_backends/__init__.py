"""The backends that come with mhc-core, each a plugin like anyone else's."""
