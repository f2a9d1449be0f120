"""Figures: what their files hold, and that they are the same whenever the same is drawn."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from runpy import run_path
from xml.etree import ElementTree

import cv2
import matplotlib
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.figure import Figure
from PIL import Image

from featurestore.errors import FeatureStoreError
from featurestore.figures import (
    check_ending,
    clustered_order,
    curves,
    draw_deletion,
    draw_invariance,
    draw_layer_matrix,
    draw_mean_maps,
    draw_neighbours,
    draw_rdm,
    draw_regions,
    draw_roc,
    draw_rsa,
    draw_trial,
    matrices,
)
from featurestore.queries.dissimilarity import rdm
from featurestore.queries.nearest import neighbours
from tests.commands import ROOT
from tests.conftest import write_photographs

LAYERS = ["conv_1", "fc<7> & $x$"]  # XML and TeX have other uses for these letters


def rows(faces: int, views: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=(faces, 20)), views, 0) + 0.5 * rng.normal(size=(faces * views, 20))
    return values.astype(np.float32), [(f"f{i + 1}", str(j + 1)) for i in range(faces) for j in range(views)]


def an_rdm(faces: int, views: int, layers: int = 0, metric: str = "cosine") -> xr.DataArray:
    values, items = rows(faces, views)
    one = rdm(values, items=items, metric=metric).drop_vars("layer")
    return xr.concat([one + 0.1 * i for i in range(layers)], pd.Index(LAYERS[:layers], name="layer")) if layers else one


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = write_photographs(tmp_path_factory.mktemp("figures") / "photographs", 4, 3)
    return {(path.parent.name, path.stem): path for path in folder.rglob("*.png")}


def roc() -> pd.DataFrame:
    rates = np.array([0, 0.001, 0.01, 0.1, 0.5, 1])
    return pd.concat(
        pd.DataFrame({"layer": n, "threshold": rates, "false_accepts": rates, "true_accepts": rates**p})
        for n, p in zip(LAYERS, (0.5, 0.2), strict=True)
    )


def profiles(differences: list) -> pd.DataFrame:
    table = pd.MultiIndex.from_product([LAYERS, differences], names=["layer", "difference"]).to_frame(index=False)
    for kind, value in (("same", 0.2), ("other", 0.8)):
        table = table.assign(**{kind: value, f"{kind}_low": value - 0.1, f"{kind}_high": np.nan})
    return table


def correlations() -> pd.DataFrame:
    return pd.DataFrame({"layer": LAYERS, "spearman": [0.1, 0.4], "spearman_low": 0.0, "spearman_high": 0.5})


def matrix(low: float = 0.25) -> pd.DataFrame:
    return pd.DataFrame([[1, low], [low, 1]], LAYERS, LAYERS)


def near(k: int = 3) -> pd.DataFrame:
    values, items = rows(4, 3)
    return neighbours(values, None, [("f1", "1"), ("f1", "2"), ("f2", "3")], k=k, items=items)


def relevance(places: int = 3, side: int = 32) -> np.ndarray:
    """For the choice on the left, half as much against it on the right."""
    maps = np.zeros((places, side, side), np.float32)
    maps[:, :, : side // 4], maps[:, :, -side // 4 :] = 1, -0.5
    return maps


def pale(places: int = 3, side: int = 32) -> np.ndarray:
    return np.full((places, side, side, 3), 255, np.uint8)


def a_trial(path: Path, **options) -> Path:
    maps = {"grad-cam": relevance(), "lrp": 1000 * relevance()}
    return draw_trial(pale(), maps, path, **{"names": ["f1|1", "f2|1", "f3|<2>"], **options})


def means(path: Path, faces: int = 2, **options) -> Path:
    names = [f"f{i}" for i in range(faces)]
    of = xr.DataArray(relevance(faces), {"face": names, "n": ("face", [7] * faces)}, ("face", "y", "x"))
    return draw_mean_maps(dict(zip(names, pale(faces), strict=True)), {"lrp": of, "ig": of}, path, **options)


REGIONS = ["background", "eyes", "beard", "hair", "mouth"]


def by_region(methods: int = 2) -> pd.DataFrame:
    names = [[f"method {i}" for i in range(methods)], REGIONS]
    table = pd.MultiIndex.from_product(names, names=["method", "region"]).to_frame(index=False)
    for value in ("share", "net", "density"):
        table = table.assign(**{value: 0.2, f"{value}_low": 0.1, f"{value}_high": np.nan})
    return table.assign(choice="head", area=0.2)


def deletion(methods: tuple[str, ...] = ("lrp", "random", "edges")) -> pd.DataFrame:
    names = [list(methods), ["deletion", "insertion"], [0, 0.5, 1]]
    table = pd.MultiIndex.from_product(names, names=["method", "kind", "fraction"]).to_frame(index=False)
    return table.assign(value=1 - table["fraction"], low=0.0, high=1.0)


Draw = Callable[[Path, dict], Path]
Drawn = Callable[[str], dict[str, Path]]
FIGURES: dict[str, tuple[Draw, list[str]]] = {
    "named": (lambda p, _: draw_rdm(an_rdm(4, 3), p), ["f1|1", "f4|3", "cosine distance"]),
    "runs": (lambda p, _: draw_rdm(an_rdm(24, 3, metric="euclidean"), p), ["face", "f7", "Euclidean distance"]),
    "panels": (lambda p, _: draw_rdm(an_rdm(4, 3, 2, "correlation"), p), [*LAYERS, "correlation distance (1 − r)"]),
    "pictured": (lambda p, files: draw_rdm(an_rdm(4, 3), p, files), ["cosine distance"]),
    "groups": (lambda p, _: draw_rdm(rdm(*rows(5, 2)[:1], items=rows(5, 2)[1], by="face"), p), ["f1", "f5"]),
    "neighbours": (
        lambda p, files: draw_neighbours(near(), {"|".join(key): file for key, file in files.items()}, p),
        ["f1|1", "same face", "another face"],
    ),
    "roc": (
        lambda p, _: draw_roc(roc(), p, {LAYERS[0]: "0.900 [0.8, 1]"}),
        [f"{LAYERS[0]}  0.900 [0.8, 1]", LAYERS[1], "equal error", "false accept rate", "0.01"],
    ),
    "degrees": (
        lambda p, _: draw_invariance(profiles([0, 45, 90]), p),
        [*LAYERS, "difference of views (degrees)", "90"],
    ),
    "pairs": (lambda p, _: draw_invariance(profiles(["a – b", "a – c"]), p), ["a – c", "views", "mean dissimilarity"]),
    "matrix": (lambda p, _: draw_layer_matrix(matrix(), p, "linear CKA"), [*LAYERS, "linear CKA", "0.25", "1.00"]),
    "signed": (lambda p, _: draw_layer_matrix(matrix(-0.5), p, "Spearman's ρ"), ["Spearman's ρ", "−0.50"]),
    "rsa": (
        lambda p, _: draw_rsa(correlations().assign(ceiling=0.7), p, "correlation with people"),
        [*LAYERS, "correlation with people", "noise ceiling"],
    ),
    "trial": (
        lambda p, _: a_trial(p, beneath=["p = 0.7\npeople 0.4", "p = 0.2", "p = 0.1"], chosen=0, answer=2),
        [
            "f3|<2>",
            "p = 0.7",
            "people 0.4",
            "grad-cam",
            "lrp",
            "head's choice",
            "answer given",
            "−1",
            "share of the row's limit",
        ],
    ),
    "mean maps": (lambda p, _: means(p), ["f0 (n = 7)", "photograph", "ig", "share of the column's limit"]),
    "regions": (lambda p, _: draw_regions(by_region(), p), [*REGIONS, "method 1", "share of the area"]),
    "densities": (lambda p, _: draw_regions(by_region(1), p, "density"), [*REGIONS, "relevance / area"]),
    "deletion": (
        lambda p, _: draw_deletion(deletion(), p, "margin"),
        ["lrp", "random", "edges", "deletion", "insertion", "margin"],
    ),
}


def texts(path: Path) -> list[str]:
    return [
        element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text") if element.text
    ]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, files: dict) -> Drawn:
    """The files of one of ``FIGURES`` by their endings, drawn once for all tests that look at it."""

    @cache
    def made(name: str) -> dict[str, Path]:
        folder, draw = tmp_path_factory.mktemp(name), FIGURES[name][0]
        return {"svg": draw(folder / "deep" / "a.svg", files), "png": draw(folder / "a.PNG", files)}

    return made


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_text_in_svg_and_a_picture_in_png(name: str, drawn: Drawn) -> None:
    svg, png = drawn(name)["svg"], drawn(name)["png"]
    assert set(FIGURES[name][1]) <= set(texts(svg))
    image = cv2.imread(str(png), cv2.IMREAD_GRAYSCALE)
    assert image.std() > 10
    width = ElementTree.parse(svg).getroot().attrib["width"]
    assert width in ("241.2pt", "504pt")  # 3.35 and 7 in of 72 points
    assert image.shape[1] == round(float(width[:-2]) / 72 * 300)
    for edge in (image[0], image[:, 0], image[:, -1]):
        assert (edge == 255).all() or name == "pictured"  # no text is cut off
    assert sorted(path.name for path in png.parent.rglob("*.*")) == ["a.PNG", "a.svg"]
    assert svg == png.parent / "deep" / "a.svg"


# All as text, and of each function, and each way that it draws, one as a picture.
PAINTED = ("runs", "pictured", "neighbours", "roc", "degrees", "pairs", "matrix", "rsa", "trial", "regions")
AGAIN = [*((name, "svg") for name in FIGURES), *((name, "png") for name in PAINTED)]


@pytest.mark.parametrize(("name", "ending"), AGAIN)
def test_the_same_gives_the_same_bytes_whatever_the_settings(
    name: str, ending: str, tmp_path: Path, files: dict, drawn: Drawn
) -> None:
    draw, first = FIGURES[name][0], drawn(name)[ending].read_bytes()
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "svg.fonttype": "path"}):
        assert draw(tmp_path / f"b.{ending}", files).read_bytes() == first
        assert matplotlib.rcParams["font.size"] == 20


def test_clusters_stand_together() -> None:
    rng = np.random.default_rng(1)
    group = rng.permutation(np.repeat([0, 1], 20))
    apart = np.where(group[:, None] == group[None, :], 0.1, 0.9) + 0.05 * rng.random((40, 40))
    apart = (apart + apart.T) / 2
    np.fill_diagonal(apart, 0)
    order = clustered_order(apart)
    assert sorted(order) == list(range(40))
    assert np.count_nonzero(np.diff(group[order])) == 1


def test_panels_share_one_order_in_which_no_unit_outweighs_another() -> None:
    one, other = an_rdm(4, 3), an_rdm(4, 3).isel(item=slice(None, None, -1), other=slice(None, None, -1)).values
    both = xr.concat([one, one.copy(data=other * 1e6)], pd.Index(LAYERS, name="layer"))
    order, images = matrices._ordered(both)
    expected = clustered_order(one.values / one.values.mean() + other / other.mean())
    assert list(order) in (list(expected), list(expected[::-1]))
    for image, values in zip(images, both.values, strict=True):
        np.testing.assert_array_equal(image, values[order][:, order])


@pytest.mark.parametrize("chunks", [None, {"item": 7, "other": 7}, {"item": 10, "other": 4}])
def test_many_items_are_means_of_blocks(chunks: dict | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "_WHOLE", 20)
    monkeypatch.setattr(matrices, "_PIXELS", 10)
    given = an_rdm(9, 3).compute()
    mixed = np.random.default_rng(2).permutation(27)
    given = given.isel(item=mixed, other=mixed)
    order, (image,) = matrices._ordered((given.chunk(chunks) if chunks else given).expand_dims("layer"))
    names = given["item"].values[order].tolist()
    assert names == [f"f{i}|{j}" for i in range(1, 10) for j in range(1, 4)]
    values = given.values[order][:, order]
    slow = [[values[i : i + 3, j : j + 3].mean() for j in range(0, 27, 3)] for i in range(0, 27, 3)]
    np.testing.assert_allclose(image, slow, rtol=1e-6)


def test_a_picture_of_means_is_in_the_order_of_faces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(matrices, "_WHOLE", 20)
    monkeypatch.setattr(matrices, "_PIXELS", 10)
    names = [text for text in texts(draw_rdm(an_rdm(9, 3), tmp_path / "a.svg")) if "|" in text]
    assert names == [f"f{i}|{j}" for i in range(1, 10) for j in range(1, 4)] * 2


def test_frames_tell_whether_the_face_is_the_same(drawn: Drawn) -> None:
    table, path = near(), drawn("neighbours")["svg"]
    svg = path.read_text()
    same = int((table["face_id"] == table["neighbour_face_id"]).sum())
    assert 0 < same < len(table)
    assert svg.lower().count("stroke: #0072b2") == same + 1  # and in the legend
    assert svg.lower().count("stroke-dasharray") == svg.lower().count("stroke: #d55e00") == len(table) - same + 1
    beneath = " ".join(texts(path))
    for row in table.itertuples():
        assert f"{row.rank}. {row.neighbour_face_id}|{row.neighbour_view}" in beneath
        assert f"d = {row.dissimilarity:#.3g}" in beneath


def test_only_the_first_items_are_shown(tmp_path: Path, files: dict, drawn: Drawn) -> None:
    one = Image.open(draw_neighbours(near(), files, tmp_path / "one.png", most=1)).height
    assert one < Image.open(drawn("neighbours")["png"]).height / 2


def test_neighbours_of_groups_have_no_frames(tmp_path: Path, files: dict) -> None:
    values, items = rows(4, 3)
    table = neighbours(values, None, by="face", k=2, items=items)
    path = draw_neighbours(table, {face: path for (face, _), path in files.items()}, tmp_path / "a.svg", most=2)
    assert "same face" not in texts(path)


def test_a_single_pair_of_views_stands_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    finish = curves._finish_profiles

    def finished(figure: Figure, grid: np.ndarray, *rest: object) -> None:
        finish(figure, grid, *rest)
        limits.extend(axes.get_xlim() for axes in grid)

    monkeypatch.setattr(curves, "_finish_profiles", finished)
    table = profiles(["another photograph"])
    draw_invariance(table[table["layer"] == table["layer"].iloc[0]], tmp_path / "a.svg")
    assert limits == [(-0.5, 0.5)]


def test_many_names_are_shortened_or_left_out(tmp_path: Path) -> None:
    names = [f"block{i}.a_very_long_name_of_a_layer_inside_of_it" for i in range(100)]
    table = pd.DataFrame({"layer": names, "spearman": 0.5, "spearman_low": 0.4, "spearman_high": 0.6})
    shown = [text for text in texts(draw_rsa(table, tmp_path / "a.svg")) if "…" in text]
    assert 40 <= len(shown) <= 60
    assert all(text.startswith("block") and text.endswith("it") for text in shown)
    many = pd.DataFrame(np.eye(100), names, names)
    assert 20 <= sum("…" in text for text in texts(draw_layer_matrix(many, tmp_path / "b.svg", "r"))) <= 60


def test_control_characters_do_not_spoil_the_file(tmp_path: Path) -> None:
    table = correlations().assign(layer=["a\x01b", "_c\n"])
    assert {"a�b", "_c�"} <= set(texts(draw_rsa(table, tmp_path / "a.svg")))


def test_the_sign_of_relevance_is_seen_on_one_scale(tmp_path: Path) -> None:
    """Also of the method whose numbers are a thousand times as large."""
    image = cv2.imread(str(a_trial(tmp_path / "a.png")))[:, :, ::-1].astype(int)
    red, blue = image[:, :, 0] - image[:, :, 2] > 60, image[:, :, 2] - image[:, :, 0] > 60
    pictures = slice(0, round(2.65 * 300))  # without the colour bar
    sides = {}
    for name, seen in (("for", red), ("against", blue)):
        count, _, boxes, _ = cv2.connectedComponentsWithStats(seen[:, pictures].astype(np.uint8))
        sides[name] = boxes[1:][boxes[1:, cv2.CC_STAT_AREA] > 1000]
        assert len(sides[name]) == 6 < count  # of three places and two methods
    left, right = (sorted(map(tuple, sides[name][:, :2])) for name in ("for", "against"))
    assert all(one[0] < other[0] for one, other in zip(left, right, strict=True))
    strongest = {name: np.unique(image[seen], axis=0)[0] for name, seen in (("for", red), ("against", blue))}
    assert strongest["for"].sum() < strongest["against"].sum()  # half as much is paler


def test_frames_say_who_chose_what(tmp_path: Path, drawn: Drawn) -> None:
    def frames(path: Path) -> tuple[int, int]:
        svg = path.read_text().lower()
        return svg.count("stroke: #0072b2"), svg.count("stroke: #d55e00")

    assert frames(drawn("trial")["svg"]) == (2, 2)  # and in the legend
    assert frames(a_trial(tmp_path / "a.svg", chosen=1)) == (2, 0)
    assert frames(a_trial(tmp_path / "b.svg", chosen=1, answer=1)) == (2, 2)
    assert "answer given" not in texts(a_trial(tmp_path / "c.svg", chosen=1))


def test_regions_stand_from_hair_to_background(drawn: Drawn) -> None:
    shown = [text for text in texts(drawn("regions")["svg"]) if text in REGIONS]
    assert shown == ["hair", "eyes", "mouth", "beard", "background"]


def test_only_the_first_faces_are_drawn(tmp_path: Path) -> None:
    assert sum("(n = 7)" in text for text in texts(means(tmp_path / "a.svg", faces=9, most=4))) == 4


BAD: dict[str, tuple[Draw, str]] = {
    "ending": (
        lambda p, _: draw_rsa(correlations(), p.with_suffix(".pdf")),
        r"drawn as \.svg or \.png, not as 'a\.pdf'",
    ),
    "dimensions": (
        lambda p, _: draw_rdm(an_rdm(4, 3).rename(other="b"), p),
        r"dimensions item, b; give one with \(item, other\)",
    ),
    "square": (lambda p, _: draw_rdm(an_rdm(4, 3)[:5], p), "`rdm` is 5 × 12; give one with as many items as others"),
    "NaN": (lambda p, _: draw_rdm(an_rdm(4, 3) * np.nan, p), "`rdm` holds NaN.*`where`"),
    "symmetry": (lambda p, _: draw_rdm(an_rdm(4, 3) * np.arange(12), p), "`rdm` is not symmetric"),
    "no photograph": (
        lambda p, files: draw_rdm(an_rdm(5, 2), p, files),
        r"`photographs` has none of 'f5\|[12]'\. Did you mean",
    ),
    "no file": (
        lambda p, f: draw_rdm(an_rdm(4, 3), p, dict.fromkeys(f, p)),
        r"photograph .*a\.svg of 'f.*cannot be read: No such",
    ),
    "no image": (
        lambda p, f: draw_rdm(an_rdm(4, 3), p, dict.fromkeys(f, Path(__file__))),
        "cannot be read: image cannot be decoded: is not a PNG",
    ),
    "most": (lambda p, f: draw_neighbours(near(), f, p, most=0), "`most` 0 rows are none"),
    "no neighbour": (
        lambda p, f: draw_neighbours(near().iloc[:, [0, 1, 2, 5]], f, p),
        "says of no neighbour who it is",
    ),
    "column": (
        lambda p, _: draw_rsa(correlations().rename(columns={"spearman": "r"}), p),
        "`table` has no column 'spearman'",
    ),
    "rows": (lambda p, _: draw_roc(roc()[:0], p), "`roc` has no rows"),
    "rate": (
        lambda p, _: draw_roc(roc().assign(true_accepts=1.5), p),
        "`roc` has 1.5 as true_accepts; numbers of 0 to 1",
    ),
    "no rate": (
        lambda p, _: draw_roc(roc().assign(false_accepts=0.0), p),
        "`roc` has no rate of false_accepts between 0 and 1",
    ),
    "areas": (
        lambda p, _: draw_roc(roc(), p, {"conv_2": "1"}),
        r"`areas` has 'conv_2', no layer of `roc`\..* conv_1\?",
    ),
    "curves": (
        lambda p, _: draw_roc(pd.concat(roc().assign(layer=str(i)) for i in range(29)), p),
        "`roc` has 29 layers; 28 curves can be told",
    ),
    "twice": (lambda p, _: draw_rsa(pd.concat([correlations()] * 2), p), "has the layer 'conv_1' more than once"),
    "layers": (
        lambda p, _: draw_layer_matrix(matrix().iloc[::-1], p, "r"),
        "`matrix` has the rows fc<7>.* and the columns conv_1",
    ),
    "range": (
        lambda p, _: draw_layer_matrix(matrix(-2), p, "r"),
        "`matrix` has -2.* as .*; numbers of -1 to 1 are drawn",
    ),
    "array": (
        lambda p, _: draw_layer_matrix(xr.DataArray(np.eye(2)), p, "r"),
        r"`matrix` has the dimensions dim_0, dim_1; .*other_layer",
    ),
    "map": (
        lambda p, _: draw_trial(pale(), {"lrp": relevance(3, 16)}, p, names=["a", "b", "c"]),
        "the maps of 'lrp' are 3 × 16 × 16, the photographs 3 × 32 × 32",
    ),
    "names": (lambda p, _: a_trial(p, names=["a"]), "`names` has 1 texts for 3 photographs"),
    "no picture": (
        lambda p, _: draw_mean_maps({}, {"a": xr.DataArray(relevance(1), {"face": ["f1"]}, ("face", "y", "x"))}, p),
        "`pictures` has none of f1",
    ),
    "page": (lambda p, _: means(p, faces=40, most=40), "40 rows of 3 pictures are too many for a page"),
    "series": (lambda p, _: draw_regions(by_region(8), p), "`table` has 8 of method; 7 can be told from one another"),
    "regions": (
        lambda p, _: draw_regions(pd.concat([by_region(1)] * 2), p),
        "`table` has a region more than once",
    ),
    "kind": (
        lambda p, _: draw_deletion(deletion().replace("insertion", "occlusion"), p),
        "`curves` has the kind 'occlusion'; deletion and insertion",
    ),
    "methods": (
        lambda p, _: draw_deletion(deletion(tuple("abcdefgh")), p),
        "`curves` has 8 methods; 7 can be told apart",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_can_be_wrong(name: str, tmp_path: Path, files: dict) -> None:
    draw, message = BAD[name]
    with pytest.raises(FeatureStoreError, match=message):
        draw(tmp_path / "a.svg", files)
    assert not list(tmp_path.iterdir())


def test_a_layer_matrix_may_be_an_array(tmp_path: Path, drawn: Drawn) -> None:
    array = xr.DataArray(matrix().to_numpy(), {"layer": LAYERS, "other_layer": LAYERS}, ("layer", "other_layer"))
    path = draw_layer_matrix(array, tmp_path / "a.svg", "linear CKA")
    assert path.read_bytes() == drawn("matrix")["svg"].read_bytes()


@pytest.mark.parametrize("ask", [check_ending, lambda path: draw_rsa(correlations(), path)])
def test_without_matplotlib_the_extra_is_named(
    ask: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = r"drawing figures needs Matplotlib .*: pip install 'face-featurestore\[figures\]'\.$"
    with pytest.raises(FeatureStoreError, match=message):
        ask(tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())
    for module in (ROOT / "featurestore" / "figures").glob("*.py"):
        run_path(str(module))  # none needs it to be imported


@pytest.mark.parametrize("name", ["a.svg", "a.png", "a.PNG", "deep/a.SVG"])
def test_an_ending_can_be_asked_for_first(name: str, tmp_path: Path) -> None:
    check_ending(tmp_path / name)
    check_ending(str(tmp_path / name))
    assert not list(tmp_path.iterdir())
    with pytest.raises(FeatureStoreError, match=r"drawn as \.svg or \.png, not as 'a\.pdf'"):
        check_ending((tmp_path / name).with_suffix(".pdf"))


def test_pyplot_is_not_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, pandas as pd; from featurestore.figures import draw_rsa\n"
        "assert 'matplotlib' not in sys.modules\n"
        "draw_rsa(pd.DataFrame({'layer': ['a'], 'spearman': 0, 'spearman_low': 0, 'spearman_high': 0}), sys.argv[1])\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.svg"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_single_difference_has_the_layers_side_by_side(tmp_path: Path) -> None:
    bounds = {f"{kind}{end}": 0.2 for kind in ("same", "other") for end in ("", "_low", "_high")}
    table = pd.DataFrame({"layer": LAYERS, "difference": "another photograph", **bounds})
    text = draw_invariance(table, tmp_path / "i.svg").read_text()
    assert "difference of views: another photograph" in text
    assert "conv_1" in text
