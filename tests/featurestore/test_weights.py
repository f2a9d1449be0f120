"""Checkpoint files: read safely, refused with reasons; random weights that are the same everywhere."""

import importlib.util
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from featurestore.errors import FeatureStoreError
from featurestore.weights import draw, open_weights

SHAPES = {
    "features.conv_1_1.weight": (4, 3, 3, 3),
    "features.conv_1_1.bias": (4,),
    "fc.fc6.weight": (5, 4),
    "fc.fc6.bias": (5,),
}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return draw(3, SHAPES, SHAPES)


def test_pth_and_safetensors_hold_the_same_network(tmp_path: Path, state) -> None:
    torch.save(state, tmp_path / "a.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "b.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "misnamed.pth")  # told apart by content
    identities = set()
    for name in ("a.pth", "b.pt", "old.pth", "misnamed.pth"):
        weights = open_weights(str(tmp_path / name), SHAPES)
        got = weights.read(SHAPES)
        assert all(torch.equal(got[key], state[key]) for key in SHAPES), name
        assert not weights.random
        identities.add(weights.identity)
    assert len(identities) == 4  # another file is another source


def test_convolutions_alone_without_prefix(tmp_path: Path, state) -> None:
    torch.save(
        {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")},
        tmp_path / "c.pth",
    )
    weights = open_weights(str(tmp_path / "c.pth"), SHAPES)
    assert weights.absent == {"fc.fc6.weight", "fc.fc6.bias"}
    assert torch.equal(
        weights.read(["features.conv_1_1.bias"])["features.conv_1_1.bias"], state["features.conv_1_1.bias"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.fc6.bias"), r"1 missing: fc\.fc6\.bias"),
        (lambda s: s.update({"fc.fc9.bias": torch.zeros(1)}), r"1 unexpected: fc\.fc9\.bias"),
        (
            lambda s: s.update({"fc.fc6.bias": torch.zeros(7)}),
            r"of another shape: fc\.fc6\.bias \(7,\) \(needed: \(5,\)\)",
        ),
    ],
)
def test_a_file_of_another_network_says_which_keys(tmp_path: Path, state, change, message: str) -> None:
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(FeatureStoreError, match=message):
        open_weights(str(tmp_path / "w.pth"), SHAPES)


class Hostile:
    """Unpickling this would leave a file behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_never_runs_code(tmp_path: Path, state, zipped: bool) -> None:
    state["x"] = Hostile(tmp_path / "owned")
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FeatureStoreError, match="can run code"):
        open_weights(str(tmp_path / "w.pth"), SHAPES)
    assert not (tmp_path / "owned").exists()
    with (tmp_path / "raw.pth").open("wb") as file:
        pickle.dump(Hostile(tmp_path / "owned"), file, protocol=2)
    with pytest.raises(FeatureStoreError):
        open_weights(str(tmp_path / "raw.pth"), SHAPES)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_truncated_files(tmp_path: Path, state, kind: str) -> None:
    path = tmp_path / f"w.{kind}"
    torch.save(state, path) if kind == "pth" else save_file(state, path)
    path.write_bytes(path.read_bytes()[:-80])
    with pytest.raises(FeatureStoreError, match=r"damaged or incomplete|neither"):
        open_weights(str(path), SHAPES)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(FeatureStoreError, match=r"neither a PyTorch .pth nor a .safetensors"):
        open_weights(str(tmp_path / "page.pth"), SHAPES)
    with pytest.raises(FeatureStoreError, match="no weights file"):
        open_weights(str(tmp_path / "gone.pth"), SHAPES)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(FeatureStoreError, match="not a state dict"):
        open_weights(str(tmp_path / "list.pth"), SHAPES)
    with pytest.raises(FeatureStoreError, match="whole number"):
        open_weights("random:x", SHAPES)


def test_random_weights_depend_on_seed_and_key_alone(parity: Path) -> None:
    spec = importlib.util.spec_from_file_location("seeded", parity / "seeded_weights.py")
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    shapes = {
        **SHAPES,
        "bn.weight": (4,),
        "bn.bias": (4,),
        "bn.running_mean": (4,),
        "bn.running_var": (4,),
        "bn.num_batches_tracked": (),
    }
    expected = seeded.fill(shapes, seed=11)
    got = draw(11, reversed(list(shapes)), shapes)
    for key in shapes:
        assert np.array_equal(got[key].numpy(), expected[key]), key
    assert open_weights("random:11", shapes).identity == "seed:11"
