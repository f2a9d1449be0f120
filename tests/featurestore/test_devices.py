"""Devices by name: one of several, those that are not there."""

import pytest
import torch

from featurestore.devices import choose_device
from featurestore.errors import FeatureStoreError
from heads.runs import Run
from heads.train import Settings
from tests.commands import command


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:one", "cuda:-1", "cuda:1:2", "cpu:0", "cuda:99999999999"])
def test_what_names_no_device(name: str) -> None:
    with pytest.raises(FeatureStoreError, match=f"`device` '{name}' is none of auto, cpu"):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_one_of_several_where_there_is_none() -> None:
    with pytest.raises(FeatureStoreError, match=r"`device` cuda:1: .*Use `device` cpu"):
        choose_device("cuda:1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_one_of_several() -> None:
    count = torch.cuda.device_count()
    assert choose_device(f"cuda:{count - 1}") == torch.device("cuda", count - 1)
    with pytest.raises(FeatureStoreError, match=f"there (is|are) {count} here"):
        choose_device(f"cuda:{count}")


@pytest.mark.parametrize(
    ("count", "said"), [(1, "there is 1 here. Use cuda:0."), (2, "there are 2 here. Use cuda:0 to")]
)
def test_the_message_counts_them(monkeypatch: pytest.MonkeyPatch, count: int, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert choose_device(f"cuda:{count - 1}") == torch.device("cuda", count - 1)
    with pytest.raises(FeatureStoreError, match=f"`device` cuda:{count}: {said}"):
        choose_device(f"cuda:{count}")


def test_a_run_is_the_same_on_each_of_several(tmp_path) -> None:
    class Task:
        sources, photographs = ("s",), "p"

        class split:
            examples_hash, hash = "e", "h"

    one, other, cpu = (Run("fc7", "conv", Settings(device=name)).identity(Task) for name in ("cuda", "cuda:1", "cpu"))
    assert one == other != cpu


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("cache_layers", ["--layers", "relu_1_1", "--images", ".", "--weights", "random:0"]),
        ("train_heads", ["--layers", "relu_1_1", "--heads", "conv"]),
        ("verify_store", ["nowhere.zarr"]),
    ],
)
def test_commands_refuse_other_words(script: str, line: list[str]) -> None:
    done = command(script, *line, "--device", "cuda:x")
    assert done.returncode == 2
    assert "'cuda:x' is not one of auto, cpu, cuda, mps, or cuda:N" in done.stderr
