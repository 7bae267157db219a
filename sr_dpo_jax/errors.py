"""The exceptions that end a run with a message instead of a traceback."""


class UsageError(Exception):
    """Bad usage, config, data or weights: the user can fix this, and the command line turns it into exit code 2.

    The message names the file and line or the config path, the offending value, the reason and the remedy.
    It never holds the text of a user's data, nor a token or password.
    """


class RunError(Exception):
    """A run that cannot go on, though nothing in its command is wrong: exit code 1. The message says what stands."""
