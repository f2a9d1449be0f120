"""Which table the conditions of a training are about: the trials, or the items of the store."""

import re
from collections.abc import Collection, Iterable

from featurestore.errors import FeatureStoreError
from featurestore.text import listing


def divide_conditions(
    conditions: Iterable[str], trials: Collection[str], items: Collection[str]
) -> tuple[list[str], list[str]]:
    """Which conditions are about trials and which about items, by the columns they name; FeatureStoreError if that is unclear."""
    of_trials: list[str] = []
    of_items: list[str] = []
    for condition in conditions:
        unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", condition)
        names = set(re.findall(r"`([^`]*)`", unquoted)) | set(re.findall(r"(?<![\w.])[A-Za-z_]\w*", unquoted))
        of_trial, of_item = names & set(trials), names & set(items)
        if bool(of_trial) == bool(of_item):
            problem = "mixes columns of trials and of items" if of_trial else "names no column there is"
            raise FeatureStoreError(
                f"`where` {condition!r} {problem}. Columns of the trials: {listing(trials, 20)}. Of the items: "
                f"{listing(sorted(items), 30)}. Give one `where` for each kind."
            )
        (of_trials if of_trial else of_items).append(condition)
    return of_trials, of_items
