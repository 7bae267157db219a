"""The one exception that means "the user can fix this": the command line turns it into exit code 2."""


class UsageError(Exception):
    """Bad usage, config, data or weights.

    The message names the file and line or the config path, the offending value, the reason and the remedy.
    It never holds the text of a user's data, nor a token or password.
    """
