"""Who is who: VGGFace2's ``identity_meta.csv``, and the names of a network's classes."""

import os
from dataclasses import replace
from pathlib import Path

import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.photos.csv_files import read_csv
from featurestore.photos.keys import FoundFaces
from featurestore.text import listing, shortened

_COLUMNS = ("Class_ID", "Name", "Flag", "Gender")
_ADDED = ("name", "gender")


def with_identities(found: FoundFaces, identities: str | os.PathLike[str]) -> FoundFaces:
    """``found`` with the columns ``name`` and ``gender`` of each face, out of a CSV as VGGFace2's ``identity_meta.csv``.

    Faces are looked up under ``Class_ID``. Raises FeatureStoreError for a file that is no such table, for faces that are not in
    it, and for photographs that have such a column already.
    """
    clash = [name for name in _ADDED if name in found.table.columns]
    if clash:
        raise FeatureStoreError(
            f"the photographs' CSV has a column {clash[0]} already. Rename it, or leave `identities` out."
        )
    table = _read_identities(Path(identities).expanduser(), "identities").set_index("Class_ID")
    faces = found.table["face_id"]
    lacking = faces[~faces.isin(table.index)].unique()
    if len(lacking):
        raise FeatureStoreError(
            f"{len(lacking)} of {faces.nunique()} faces are not in {identities}: {listing(lacking, 3)}. Its Class_ID are such as "
            f"{listing(table.index[:1])}, and have to be the faces' names. Add them, or leave `identities` out."
        )
    rows = table.loc[faces]
    columns = {added: rows[column].to_numpy(object) for added, column in zip(_ADDED, ("Name", "Gender"), strict=True)}
    return replace(found, table=found.table.reset_index(drop=True).assign(**columns))


def class_names(labels: str | os.PathLike[str], n: int) -> pd.DataFrame:
    """The ``n`` classes of a network in order: columns ``identity`` and ``label`` (str).

    ``labels`` is VGGFace2's ``identity_meta.csv``, of which the networks know the rows with ``Flag`` 1, in the order of the file,
    or a text file with a name a line, whose ``identity`` is the name. Raises FeatureStoreError for a file of another number of
    classes.
    """
    path = Path(labels).expanduser()
    if path.suffix.lower() == ".csv":
        table = _read_identities(path, "labels")
        trained = table[table["Flag"] == "1"]
        if (
            len(trained) != n and len(table) == n
        ):  # some number the test set's identities after those of the training set
            trained = pd.concat([trained, table[table["Flag"] != "1"]])
        counts = f"{len(trained)} rows with Flag 1, {len(table)} in all"
        known = pd.DataFrame({"identity": trained["Class_ID"].to_numpy(), "label": trained["Name"].to_numpy()})
    else:
        names = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
        counts = f"{len(names)} lines"
        known = pd.DataFrame({"identity": names, "label": names}, dtype=object)
    if len(known) != n:
        raise FeatureStoreError(
            f"{path} has {counts}, but the layer {n} classes, so it names those of another network. Give `labels` the "
            "names that belong to these weights."
        )
    return known


def _read_identities(path: Path, argument: str) -> pd.DataFrame:
    _refuse_absent(path, argument)
    table = read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    table.columns = [str(name).strip() for name in table.columns]
    missing = [name for name in _COLUMNS if name not in table.columns]
    if missing:
        raise FeatureStoreError(
            f"{path} has no column {', '.join(missing)}; it has {listing(table.columns, 20)}. "
            "It is read as VGGFace2's identity_meta.csv: Class_ID, Name, Sample_Num, Flag, Gender."
        )
    table = table[list(_COLUMNS)].apply(lambda column: column.str.strip())
    twice = table["Class_ID"][table["Class_ID"].duplicated()]
    if len(twice):
        raise FeatureStoreError(f"{path} has the Class_ID {shortened(twice.iloc[0])} twice. Remove one.")
    return table


def _read_text(path: Path) -> str:
    _refuse_absent(path, "labels")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FeatureStoreError(f"{path} cannot be read as a list of names: {error}.") from None


def _refuse_absent(path: Path, argument: str) -> None:
    if not path.is_file():
        raise FeatureStoreError(f"there is no file {path} (or it is a folder). Check the path given with `{argument}`.")
