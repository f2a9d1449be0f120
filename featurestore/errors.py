"""The one error type that users are meant to read."""


class FeatureStoreError(Exception):
    """Something the user can fix: the message says what, why and what to do.

    Scripts print the message without a traceback and exit with status 1.
    """
