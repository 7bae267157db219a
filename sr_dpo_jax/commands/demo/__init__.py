"""A small world where the truth is known: tasks, the computed quality of any response, the paper's protocol in it."""
