"""The error that a user can act on: bad input, named with its place and what to do next."""


class UserError(ValueError):
    """Bad input or a damaged file. The message says what is wrong, where, the value seen and what to do.

    Commands print the message alone, without a traceback, and exit with status 2.
    """
