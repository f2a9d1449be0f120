"""Questions to a store as a user types them: what is printed, written and drawn, and what is refused."""

import itertools
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from click.testing import CliRunner, Result
from scipy import stats
from scipy.spatial.distance import pdist, squareform
from sklearn.metrics import roc_auc_score

from featurestore import FeatureStore
from pipelines import query_layers
from tests.commands import command
from tests.conftest import run_pass, write_photographs

LAYERS = ["maxp_1_2", "maxp_2_2"]
FACES = ["f1", "f2", "f3", "f4"]
VIEWS = ["frontal", "yaw+30", "yaw-30"]
AGES = {"f1": 20, "f2": 31, "f3": 27, "f4": 55}
RANDOM = "vggface, weights random:0 (random numbers, not a trained network)"
HEADS = {".png": b"\x89PNG", ".svg": b"<?xml"}
COMMANDS = sorted(query_layers.main.commands)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 items with an age and a gender. Read only."""
    folder = tmp_path_factory.mktemp("faces")
    photographs = write_photographs(folder / "photographs", len(FACES), len(VIEWS))
    rows = [
        (face, view, photographs / face / f"{number}.png", AGES[face], "female" if face in ("f1", "f4") else "male")
        for face in FACES
        for number, view in enumerate(VIEWS, start=1)
    ]
    table = pd.DataFrame(rows, columns=["face_id", "view", "path", "age", "gender"])
    table.to_csv(folder / "faces.csv", index=False)
    run_pass(folder / "faces.csv", folder / "faces.zarr", LAYERS)
    return folder / "faces.zarr"


def ask(store: Path, *words: object) -> Result:
    """The command's first word and options, in this process, of the store."""
    name, *options = map(str, words)
    capped = any(param.name == "memory" for param in query_layers.main.commands[name].params)
    memory = ["--memory", "8GiB"] if capped else []  # beside what the tests' own process holds; a later one counts
    return CliRunner().invoke(query_layers.main, [name, "--store", str(store), *memory, *options])


def answered(store: Path, *words: object) -> str:
    done = ask(store, *words)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(done: Result) -> str:
    """Its message, which is the whole of it: no traceback."""
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit)
    assert done.stderr.startswith("Error: ")
    return done.stderr


def values(store: Path, layer: str = LAYERS[1]) -> np.ndarray:
    """(12, features) float64, as the store has them."""
    rows = FeatureStore.open(store).source().rows(layer)
    return rows.gather(np.arange(len(FACES) * len(VIEWS))).flatten(1).double().numpy()


def keys(store: Path) -> list[tuple[str, str]]:
    return [tuple(key) for key in FeatureStore.open(store).source().keys]


def of_faces(store: Path, layer: str = LAYERS[1]) -> np.ndarray:
    """Means of the three views of each face."""
    return values(store, layer).reshape(len(FACES), len(VIEWS), -1).mean(axis=1)


def drawn(path: Path) -> bool:
    return path.read_bytes().startswith(HEADS[path.suffix])


def wide(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(line) > 100]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_has_help_with_an_example(name: str) -> None:
    done = CliRunner().invoke(query_layers.main, [name, "--help"])
    assert done.exit_code == 0
    examples = done.output.partition("\nExamples:\n")[2]
    assert f"\n  python pipelines/query_layers.py {name} " in examples


def test_there_are_eleven_commands() -> None:
    assert COMMANDS == [
        "compare-layers", "export", "identify", "import", "invariance", "mean", "neighbours", "rdm", "rsa", "statistics",
        "verify-faces",
    ]  # fmt: skip


def test_rdm_in_a_process(store: Path, tmp_path: Path) -> None:
    out, figure = tmp_path / "rdm.csv", tmp_path / "rdm.png"
    done = command("query_layers", "rdm", "--store", store, "--layers", LAYERS[1], "--out", out, "--figure", figure)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == RANDOM
    assert "within faces" in done.stdout
    assert f"Kept: {out}\n" in done.stdout
    assert f"Kept: {figure}\n" in done.stdout
    table = pd.read_csv(out, index_col=0)
    assert table.index.tolist() == table.columns.tolist() == ["|".join(key) for key in keys(store)]
    assert table.to_numpy() == pytest.approx(squareform(pdist(values(store), "cosine")), abs=1e-6)
    assert drawn(figure)


def test_rdms_of_faces_of_all_layers(store: Path, tmp_path: Path) -> None:
    out, figure = tmp_path / "rdm.zarr", tmp_path / "rdm.svg"
    answered(store, "rdm", "--by", "face", "--metric", "euclidean", "--out", out, "--figure", figure)
    with xr.open_zarr(out) as found:
        matrices = found["dissimilarity"].load()
    assert matrices.dims == ("layer", "item", "other")
    assert matrices["item"].values.tolist() == FACES
    for layer in LAYERS:
        wanted = squareform(pdist(of_faces(store, layer)))
        assert matrices.sel(layer=layer).values == pytest.approx(wanted, rel=1e-5)
    assert drawn(figure)


def test_principal_components(store: Path, tmp_path: Path) -> None:
    answered(
        store, "rdm", "--layers", LAYERS[1], "--pca", 1, "--metric", "euclidean", "--out", tmp_path / "rdm.parquet"
    )
    table = pd.read_parquet(tmp_path / "rdm.parquet")
    assert table.to_numpy() == pytest.approx(squareform(pdist(values(store))), rel=1e-4, abs=1e-3)


def test_only_items_that_meet_all_conditions(store: Path, tmp_path: Path) -> None:
    conditions = ["--where", "view == 'frontal'", "age > 25"]
    answered(store, "rdm", "--layers", LAYERS[0], *conditions, "--out", tmp_path / "rdm.npy")
    names = pd.read_csv(tmp_path / "rdm.names.csv")["item"].tolist()
    assert names == ["f2|frontal", "f3|frontal", "f4|frontal"]
    chosen = [keys(store).index(tuple(name.split("|"))) for name in names]
    wanted = squareform(pdist(values(store, LAYERS[0])[chosen], "cosine"))
    assert np.load(tmp_path / "rdm.npy") == pytest.approx(wanted, abs=1e-6)


def test_rsa_with_a_file(store: Path, tmp_path: Path) -> None:
    pairs = list(itertools.combinations(FACES, 2))
    table = pd.DataFrame(pairs, columns=["face_1", "face_2"]).assign(similarity=[3, 1, 4, 1.5, 9, 2.6])
    extra = pd.DataFrame([("f1", "f9", 5)], columns=table.columns)
    pd.concat([table, extra]).to_csv(tmp_path / "pairs.csv", index=False)
    options = ["--permutations", 50, "--out", tmp_path / "rsa.csv", "--figure", tmp_path / "rsa.svg"]
    done = ask(store, "rsa", "--pairs", tmp_path / "pairs.csv", *options)
    assert done.exit_code == 0, done.output
    assert "f9" in done.stderr
    assert not wide(done.stdout.partition("Kept")[0])
    found = pd.read_csv(tmp_path / "rsa.csv").set_index("layer")
    assert found.index.tolist() == LAYERS
    for layer in LAYERS:
        wanted = stats.spearmanr(-table["similarity"], pdist(of_faces(store, layer), "cosine")).statistic
        assert found["spearman"][layer] == pytest.approx(wanted)
    assert drawn(tmp_path / "rsa.svg")


def test_rsa_with_a_column(store: Path, tmp_path: Path) -> None:
    answered(
        store,
        "rsa",
        "--pairs",
        "age",
        "--layers",
        LAYERS[1],
        "--by",
        "none",
        "--permutations",
        9,
        "--out",
        tmp_path / "a.csv",
    )
    ages = np.array([AGES[face] for face, _ in keys(store)], float)
    wanted = stats.pearsonr(pdist(ages[:, None]), pdist(values(store), "cosine")).statistic
    assert pd.read_csv(tmp_path / "a.csv")["pearson"][0] == pytest.approx(wanted, abs=1e-5)


def test_neighbours_of_one_face(store: Path, tmp_path: Path) -> None:
    options = ["--layers", LAYERS[1], "-k", 2, "--out", tmp_path / "n.parquet", "--figure", tmp_path / "n.png"]
    shown = answered(store, "neighbours", "--of", "f2", *options)
    assert RANDOM in shown
    table = pd.read_parquet(tmp_path / "n.parquet")
    distances = squareform(pdist(values(store), "cosine"))
    np.fill_diagonal(distances, np.inf)
    wanted = [
        (*keys(store)[i], *keys(store)[j]) for i in (3, 4, 5) for j in np.argsort(distances[i], kind="stable")[:2]
    ]
    columns = ["face_id", "view", "neighbour_face_id", "neighbour_view"]
    assert list(table[columns].itertuples(index=False, name=None)) == wanted
    assert drawn(tmp_path / "n.png")


def test_neighbours_of_items_are_of_other_faces(store: Path, tmp_path: Path) -> None:
    asked = ["--of", "f2|yaw+30", "f1", "--other-faces", "--layers", LAYERS[1]]
    answered(store, "neighbours", *asked, "--out", tmp_path / "n.csv")
    table = pd.read_csv(tmp_path / "n.csv")
    assert table["face_id"].tolist() == ["f2"] * 5 + ["f1"] * 15
    assert (table["face_id"] != table["neighbour_face_id"]).all()


def test_more_rows_than_are_shown(store: Path, tmp_path: Path) -> None:
    shown = answered(store, "neighbours", "--layers", LAYERS[1], "-k", 3)
    assert "and 16 more rows; --out FILE writes all" in shown
    shown = answered(store, "neighbours", "--layers", LAYERS[1], "-k", 3, "--out", tmp_path / "n.csv")
    assert "and 16 more rows\n" in shown
    assert len(pd.read_csv(tmp_path / "n.csv")) == 36


def test_identify(store: Path, tmp_path: Path) -> None:
    shown = answered(store, "identify", "--held-out", "yaw+30", "yaw-30", "--out", tmp_path / "i.csv")
    assert RANDOM in shown
    assert not wide(shown.partition("Kept")[0])
    table = pd.read_csv(tmp_path / "i.csv").set_index("layer")
    assert {"source", "backbone", "weights"} <= set(table.columns)
    distances = squareform(pdist(values(store, LAYERS[0]), "cosine"))
    frontal = np.arange(0, 12, 3)
    right = [frontal[distances[i, frontal].argmin()] // 3 == i // 3 for i in range(12) if i % 3]
    assert table["accuracy"][LAYERS[0]] == pytest.approx(np.mean(right))


def test_verify_faces(store: Path, tmp_path: Path) -> None:
    shown = answered(store, "verify-faces", "--out", tmp_path / "v.csv", "--figure", tmp_path / "roc.svg")
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line}
    assert lines["n_same"] == ["12", "12"]
    assert lines["n_different"] == ["54", "54"]
    table = pd.read_csv(tmp_path / "v.csv").set_index("layer")
    assert [float(number) for number in lines["area"]] == pytest.approx(table["area"].tolist(), abs=6e-4)
    faces = np.arange(12) // 3
    same = np.equal.outer(faces, faces)[np.triu_indices(12, 1)]
    wanted = roc_auc_score(same, -pdist(values(store), "cosine"))
    assert table["area"][LAYERS[1]] == pytest.approx(wanted)
    assert "area 0." in (tmp_path / "roc.svg").read_text()


def test_verify_faces_with_given_pairs(store: Path, tmp_path: Path) -> None:
    pairs = [("f1", "f1"), ("f2", "f2"), ("f3", "f3"), ("f1", "f2"), ("f2", "f3"), ("f3", "f4"), ("f4", "f1")]
    rows = [(one, "frontal", other, "yaw+30") for one, other in pairs]
    pd.DataFrame(rows, columns=["face_1", "view_1", "face_2", "view_2"]).to_csv(tmp_path / "p.csv", index=False)
    answered(
        store,
        "verify-faces",
        "--layers",
        LAYERS[1],
        "--pairs",
        tmp_path / "p.csv",
        "--metric",
        "euclidean",
        "--out",
        tmp_path / "v.csv",
    )
    rows_of = {key: row for key, row in zip(keys(store), values(store), strict=True)}
    distances = [np.linalg.norm(rows_of[one, "frontal"] - rows_of[other, "yaw+30"]) for one, other in pairs]
    wanted = roc_auc_score([one == other for one, other in pairs], -np.array(distances))
    assert pd.read_csv(tmp_path / "v.csv")["area"][0] == pytest.approx(wanted)


def test_statistics(store: Path, tmp_path: Path) -> None:
    shown = answered(store, "statistics", "--out", tmp_path / "s.csv")
    assert not wide(shown.partition("Kept")[0])
    found = pd.read_csv(tmp_path / "s.csv").set_index("layer").loc[LAYERS[1]]
    held = values(store)
    assert found["mean"] == pytest.approx(held.mean(), rel=1e-5)
    assert found["spread"] == pytest.approx(held.std(), rel=1e-5)
    assert found["sparsity"] == pytest.approx((held == 0).mean())
    assert found["dead"] == (np.ptp(held, axis=0) == 0).sum()


def test_statistics_of_groups(store: Path, tmp_path: Path) -> None:
    answered(store, "statistics", "--layers", LAYERS[1], "--by", "gender", "--out", tmp_path / "s.csv")
    table = pd.read_csv(tmp_path / "s.csv").set_index("group")
    assert table["items"].to_dict() == {"female": 6, "male": 6}
    assert table["mean"]["male"] == pytest.approx(values(store)[3:9].mean(), rel=1e-5)


def test_units_that_go_with_a_trait(store: Path, tmp_path: Path) -> None:
    answered(store, "statistics", "--layers", LAYERS[1], "--trait", "age", "--out", tmp_path / "u.parquet")
    first = pd.read_parquet(tmp_path / "u.parquet").iloc[0]
    column = of_faces(store)[:, int(first["unit"])]
    assert first["r"] == pytest.approx(stats.spearmanr(column, list(AGES.values())).statistic)


def test_mean(store: Path, tmp_path: Path) -> None:
    shown = answered(store, "mean", "--layers", LAYERS[1], "--by", "gender", "--out", tmp_path / "m.zarr")
    assert "mean: 2 group × 128 channel × 56 y × 56 x" in shown
    with xr.open_zarr(tmp_path / "m.zarr") as found:
        male = found["mean"].sel(group="male").values.ravel()
    np.testing.assert_allclose(male, values(store)[3:9].mean(axis=0), rtol=1e-5, atol=1e-4)
    shown = answered(store, "mean", "--layers", LAYERS[1], "--out", tmp_path / "m.npy")
    assert f"Kept: {tmp_path / 'm.npy'}\n" in shown
    found = np.load(tmp_path / "m.npy")
    assert found.shape == (128, 56, 56)
    np.testing.assert_allclose(found.ravel(), values(store).mean(axis=0), rtol=1e-5, atol=1e-4)


def test_invariance(store: Path, tmp_path: Path) -> None:
    shown = answered(store, "invariance", "--out", tmp_path / "i.csv", "--figure", tmp_path / "i.svg")
    assert not wide(shown.partition("Kept")[0])
    table = pd.read_csv(tmp_path / "i.csv").set_index(["layer", "difference"])
    distances = squareform(pdist(values(store), "cosine"))
    sides = np.arange(12).reshape(4, 3)[:, 1:]  # yaw+30 and yaw-30 of each face
    assert table["same"][LAYERS[1], 60] == pytest.approx(distances[sides[:, 0], sides[:, 1]].mean(), abs=1e-6)
    assert table["n_pairs"][LAYERS[1]].to_dict() == {30: 8, 60: 4}
    assert "mean cosine distance" in (tmp_path / "i.svg").read_text()
    answered(store, "invariance", "--reference", "yaw+30", "--out", tmp_path / "r.csv")
    table = pd.read_csv(tmp_path / "r.csv").set_index(["layer", "difference"])
    assert table["n_pairs"][LAYERS[1]].to_dict() == {30: 4, 60: 4}


def test_compare_layers(store: Path, tmp_path: Path) -> None:
    answered(store, "compare-layers", "--measure", "rdm", "--out", tmp_path / "c.csv", "--figure", tmp_path / "c.png")
    table = pd.read_csv(tmp_path / "c.csv", index_col=0)
    wanted = np.corrcoef(pdist(values(store, LAYERS[0]), "cosine"), pdist(values(store), "cosine"))
    assert table.loc[LAYERS, LAYERS].to_numpy() == pytest.approx(wanted, abs=1e-5)
    assert drawn(tmp_path / "c.png")
    answered(store, "compare-layers", "--measure", "cka-biased", "--by", "face", "--out", tmp_path / "b.csv")
    one, other = (of_faces(store, layer) - of_faces(store, layer).mean(axis=0) for layer in LAYERS)
    products = [np.linalg.norm(a @ b.T) for a, b in ((one, one), (other, other))]
    cka = np.einsum("ij,ij->", one @ one.T, other @ other.T) / np.prod(products)
    assert pd.read_csv(tmp_path / "b.csv", index_col=0)[LAYERS[1]][LAYERS[0]] == pytest.approx(cka, abs=1e-5)


def test_export_as_arrays(store: Path, tmp_path: Path) -> None:
    shown = answered(store, "export", "--layers", LAYERS[1], "--format", "numpy", "--to", tmp_path / "e")
    assert RANDOM in shown
    assert np.array_equal(np.load(tmp_path / "e" / f"{LAYERS[1]}.npy").reshape(12, -1), values(store))
    items = pd.read_csv(tmp_path / "e" / "items.csv")
    assert list(zip(items["face_id"], items["view"], strict=True)) == keys(store)
    asked = ["--layers", LAYERS[1], "--format", "files", "--where", "age < 30", "--to", tmp_path / "f"]
    shown = answered(store, "export", *asked)
    assert f"Kept: {tmp_path / 'f'}" in shown
    found = np.load(tmp_path / "f" / LAYERS[1] / "f3" / "yaw+30.npy")
    assert np.array_equal(found.ravel(), values(store)[7])


def test_export_as_hdf5(store: Path, tmp_path: Path) -> None:
    answered(store, "export", "--format", "hdf5", "--to", tmp_path / "a.h5", "--where", "gender == 'male'")
    with h5py.File(tmp_path / "a.h5") as file:
        assert set(LAYERS) <= set(file)
        assert file["view"].asstr()[:].tolist() == VIEWS * 2
        assert np.array_equal(file[LAYERS[0]][:].reshape(6, -1), values(store, LAYERS[0])[3:9])
    answered(store, "export", "--layers", LAYERS[1], "--format", "rsatoolbox", "--to", tmp_path / "r", "--by", "face")
    with h5py.File(tmp_path / "r" / f"{LAYERS[1]}.h5") as file:
        np.testing.assert_allclose(file["measurements"][:], of_faces(store), rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def imported(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the rows of one layer, of whose photographs nothing is known. Read only."""
    folder = tmp_path_factory.mktemp("imported")
    np.save(folder / "rows.npy", values(store).astype(np.float32))
    pd.DataFrame(keys(store), columns=["face_id", "view"]).to_csv(folder / "keys.csv", index=False)
    options = ["--kind", "numpy", "--layer", "old", "--items", folder / "keys.csv", "--name", "elsewhere"]
    shown = answered(folder / "new.zarr", "import", folder / "rows.npy", *options, "--dry-run")
    assert shown == f"{folder / 'rows.npy'}: 12 rows, first ('f1', 'frontal')\n"
    assert not (folder / "new.zarr").exists()
    shown = answered(folder / "new.zarr", "import", folder / "rows.npy", *options)
    assert f"Imported 12 items of old into {folder / 'new.zarr'}, source elsewhere." in shown
    return folder / "new.zarr"


def test_an_import_is_asked_as_any_other(store: Path, imported: Path, tmp_path: Path) -> None:
    out, figure = tmp_path / "rdm.npy", tmp_path / "rdm.png"
    shown = answered(imported, "rdm", "--layers", "old", "--out", out, "--figure", figure)
    assert "imported, weights unknown" in shown
    assert np.load(out) == pytest.approx(squareform(pdist(values(store), "cosine")), abs=1e-6)
    assert drawn(figure)
    message = refused(ask(imported, "neighbours", "--figure", tmp_path / "n.png"))
    assert "imported without their photographs" in message
    assert "Leave --figure out" in message


def test_an_import_is_described(imported: Path) -> None:
    done = command("store_info", imported)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "backbone imported, weights unknown: imported from rows.npy" in lines
    assert "old 401408 float32 12 of 12 18.4 MiB" in lines


def test_an_import_is_sound(imported: Path) -> None:
    done = command("verify_store", imported)
    assert done.returncode == 0, done.stdout


def test_photographs_are_those_of_the_source_asked(store: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.zarr"
    run_pass(write_photographs(tmp_path / "first", 1, 2, seed=1), both, LAYERS[:1])
    run_pass(write_photographs(tmp_path / "second", 2, 3, seed=2), both, LAYERS[1:], weights="random:1")
    answered(both, "neighbours", "--layers", LAYERS[1], "-k", 1, "--figure", tmp_path / "n.png")
    assert drawn(tmp_path / "n.png")


@pytest.mark.parametrize("scheduler", ["synchronous", "processes"])
def test_schedulers_give_the_same(store: Path, tmp_path: Path, scheduler: str) -> None:
    options = ["--scheduler", scheduler, "--memory", "4GiB", "--out", tmp_path / "rdm.npy"]
    done = command("query_layers", "rdm", "--store", store, "--layers", LAYERS[1], *options)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "rdm.npy") == pytest.approx(squareform(pdist(values(store), "cosine")), abs=1e-6)


REFUSED = {
    "layer": (["rdm", "--layers", "maxp_2_3"], "has no layer maxp_2_3. Did you mean maxp_2_2"),
    "metric": (["rdm", "--metric", "cosin"], "there is no --metric 'cosin'. Did you mean cosine?"),
    "reference": (["invariance", "--reference", "yaw+3"], "no view 'yaw+3' for --reference. Did you mean yaw+30"),
    "held out": (["identify", "--held-out", "yaw30"], "no view yaw30 in"),
    "face": (["neighbours", "--layers", LAYERS[1], "--of", "ff1"], "--of 'ff1' is not among the 12 items. Did you mean f1"),
    "view": (["neighbours", "--layers", LAYERS[1], "--of", "f1|front"], "Did you mean frontal?"),
    "several layers": (["neighbours"], "neighbours are those in one layer; this would be maxp_1_2, maxp_2_2"),
    "a mean of several": (["mean"], "means are of one layer; this would be maxp_1_2, maxp_2_2"),
    "source": (["rdm", "--sources", "dlib"], "has no source 'dlib'. It is one of: vggface-"),
    "condition": (["rdm", "--where", "agee > 3"], "--where 'agee > 3' cannot be evaluated"),
    "no items": (["rdm", "--where", "age > 99"], "none of the 12 items meet --where age > 99"),
    "group": (["rdm", "--by", "gendr"], "no column 'gendr' to be grouped by. Did you mean gender?"),
    "share": (["rdm", "--pca", "95"], "--pca 95.0 is no share of the variance"),
    "pairs": (["rsa", "--pairs", "agee"], "--pairs 'agee' is neither a file nor a metadata column of numbers. Did you mean age?"),
    "no pairs": (["verify-faces", "--pairs", "none.csv"], "there is no file none.csv"),
    "trait": (["statistics", "--layers", LAYERS[1], "--trait", "gender"], "--trait 'gender' is not numeric"),
    "memory": (["rdm", "--memory", "1MB"], "--memory 977 KiB is too little: the program alone takes"),
    "no memory": (["rdm", "--memory", "plenty"], "--memory 'plenty' is no number of bytes, such as 1GiB"),
    "scheduler": (["rdm", "--scheduler", "proceses"], "--scheduler 'proceses' is neither an address"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words, message = REFUSED[name]
    assert message in refused(ask(store, *words, "--out", "out.npy"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rdm", "--out", "rdm.cvs"], "--out rdm.cvs ends in none of .csv, .parquet, .zarr, .npy"),
        (["rdm", "--out", "rdm.csv"], "--out rdm.csv takes one matrix: name one layer"),
        (["rdm", "--figure", "rdm.jpg"], "a figure is drawn as .svg or .png, not as 'rdm.jpg'"),
        (
            ["export", "--format", "numpy", "--to", "e", "--layers", "maxp_2"],
            "has no layer maxp_2. Did you mean maxp_2_2",
        ),
        (["import", "rows.npy", "--kind", "numpy", "--layer", "a"], "rows.npy"),
    ],
)
def test_wrong_files(
    words: list[str], message: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(ask(store, *words))
    assert not list(tmp_path.iterdir())


def test_there_is_no_store(tmp_path: Path) -> None:
    done = command("query_layers", "statistics", "--store", tmp_path / "none.zarr")
    assert done.returncode == 1
    assert f"there is no store {tmp_path / 'none.zarr'}" in done.stderr
    assert "Traceback" not in done.stderr


def test_rdms_for_rsatoolbox(store: Path, tmp_path: Path) -> None:
    answered(store, "rdm", "--by", "face", "--out", tmp_path / "rdms.h5")
    with h5py.File(tmp_path / "rdms.h5") as file:
        assert file["dissimilarities"].shape[0] == 2
    assert "ends in none of .csv, .parquet, .zarr, .npy, which" in refused(ask(store, "statistics", "--out", "s.h5"))
