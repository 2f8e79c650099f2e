"""The one error type for what a user can put right: a wrong setting, path or file."""


class UsageError(ValueError):
    """A wrong setting, path or file; the message names the value, the rule and the way out.

    Commands print it as one line and exit with code 2. Anything else that escapes is a bug and
    keeps its traceback.
    """
