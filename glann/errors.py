"""The one error that a user can mend."""


class GlannError(Exception):
    """Something given to glann is missing, damaged or out of range.

    The message says what was given, what was wanted and what to do.  The command line prints it
    without a traceback and exits with code 2.
    """


class NotFinite(GlannError):
    """A training came to numbers that are not finite: a result, where trainings are compared."""


def check_fitted(model: object, attribute: str) -> None:
    """GlannError if a model has not learned yet: `attribute` is what fitting gives it."""
    if not hasattr(model, attribute):
        raise GlannError(
            f"this {type(model).__name__} has not learned anything yet; call fit, or load what was "
            "saved"
        )
