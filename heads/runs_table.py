"""The table of all runs under a folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from heads.run_files import read_result, write_csv
from heads.scores import paired_test


def runs_table(folder: Path) -> pd.DataFrame:
    """All finished runs under ``folder``, the best first: scores, settings, time, and a paired test against zero-shot."""
    rows, right = [], {}
    for path in sorted(folder.glob("*/result.json")):
        try:
            config = json.loads((path.parent / "config.json").read_text("utf-8"))
            correct = pd.read_csv(path.parent / "predictions.csv", usecols=["correct"])["correct"].to_numpy(bool)
            flat = {name: config[name] for name in ("layer", "head", "split", "split_name", "trials", "photographs")}
            flat |= {"sources": " ".join(config["sources"]), **config["settings"], **config["options"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a run of ours, or one that is being written
        result = read_result(path.parent)
        if result is not None:
            rows.append({**result, **flat})
            right[result["name"]] = correct
    table = pd.DataFrame(rows)
    if table.empty:
        return table

    def same(row: dict[str, Any]) -> tuple[Any, ...]:
        return *(row[name] for name in ("layer", "split", "sources", "photographs")), row.get("measure", "cosine")

    baseline = {same(row): row["name"] for row in rows if row["head"] == "zero-shot"}
    table["p_zero_shot"] = [
        np.nan
        if row["head"] == "zero-shot" or same(row) not in baseline
        else paired_test(right[row["name"]], right[baseline[same(row)]]).p
        for row in rows
    ]
    front = [
        "name",
        "layer",
        "head",
        "accuracy",
        "low",
        "high",
        "n_test",
        "chance",
        "ceiling",
        "normalised",
        "p_zero_shot",
    ]
    table = table[[*front, *(name for name in table if name not in front)]]
    return table.sort_values(["accuracy", "name"], ascending=[False, True], ignore_index=True)


def write_runs_table(folder: Path) -> pd.DataFrame:
    """Make ``runs.csv`` from the folders; returns it."""
    table = runs_table(folder)
    write_csv(folder / "runs.csv", table)
    return table
