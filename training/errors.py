"""The one error a user can put right; the command prints it as a line instead of a traceback."""


class Refused(ValueError):
    """The input, the configuration or the run's own proof is not what it must be; the message says what."""
