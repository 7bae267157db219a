"""A world where the truth is known: small tasks, computed quality of any response, the paper's protocol in it."""
