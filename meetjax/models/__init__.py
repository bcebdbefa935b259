"""Model definitions: pure functions of (config, params, tokens, adapters, gates)."""
