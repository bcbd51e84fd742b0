"""The package's own exception."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that cannot serve the call; the message has the reason and the cure."""
