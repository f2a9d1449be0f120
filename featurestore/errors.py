"""The one error type that users are meant to read."""

from featurestore.text import with_urls


class FeatureStoreError(Exception):
    """Something the user can fix: the message says what, why and what to do.

    Scripts print the message without a traceback and exit with status 1.
    """

    def __str__(self) -> str:
        return with_urls(super().__str__())
