"""The one error that a user can mend."""


class GlannError(Exception):
    """Something given to glann is missing, damaged or out of range.

    The message says what was given, what was wanted and what to do.  The command line prints it
    without a traceback and exits with code 2.
    """


class NotFinite(GlannError):
    """A training came to numbers that are not finite: a result, where trainings are compared."""
