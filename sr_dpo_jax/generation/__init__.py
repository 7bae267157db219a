"""Responses from the model on the mesh: cache (keys and values), decode (compiled programs), generator (slots)."""
