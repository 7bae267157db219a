"""The configuration: schema (every key), load (YAML), checks (between keys), explain (messages). Imports no jax."""
