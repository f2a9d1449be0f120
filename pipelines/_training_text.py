"""What training says: the plan, a line per epoch and run, tables of results and comparisons."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines._cli import as_typed

if TYPE_CHECKING:
    import pandas as pd

    from heads.finetuning_plan import FinetuningPlan
    from heads.grid import Grid
    from heads.tasks import Task
    from heads.train import Progress


def plan_text(grid: "Grid", jobs: int, kept: str = "") -> str:
    """What will be trained on what, and what it costs. ``kept``: what becomes of freed memory, if there is something to say."""
    from featurestore.text import human_bytes

    lines = []
    for task, _ in grid.parts:
        if task.split.fold and task.split.fold[0] > 1:
            lines.append(_split_line(task))
            continue
        kind = f"photographs of {len(task.classes)} faces to identify" if task.classes else "odd-one-out trials"
        about = task.about
        lines.append(f"  examples  {len(task.items)} {kind}, from {_trials_text(about) or task.store}")
        if about.get("where"):
            lines.append(f"  where     {about['where']}")
        if about.get("sessions"):
            lines.append(f"  sessions  {about['sessions']}")
        lines.append(f"  source    {' + '.join(task.sources)} in {task.store}: {about['backbone']}, {about['weights']}")
        if "views" in about:
            lines.append(f"  views     {about['views']}")
        lines.append(_split_line(task))
        lines.append(f"  chance    {task.chance:.3f}")
        if not task.classes:
            lines.append(f"  ceiling   {_ceiling_text(task, grid)}")
        if len(task.split.indices("test")) < 50 and not task.split.fold:
            lines.append("  note      so few test examples give wide intervals; see --fractions and --folds")
        few = len(task.split.indices("validation"))
        if 0 < few < _FEW_VALIDATION:
            lines.append(
                f"  note      {few} examples say little of which epoch and which head are best; see --fractions"
            )
        lines += _kinds(task.description())
    if grid.trials:
        if grid.trials.unanswered:
            lines.append(f"  left out  {grid.trials.unanswered} trials without an answer (odd empty or 0)")
        if grid.trials.excluded:
            lines.append(f"  left out  {grid.trials.excluded} trials that do not meet --where")
        if len(grid.trials.faulty):
            lines.append(f"  left out  {len(grid.trials.faulty)} faulty trials, kept in {faulty_file(grid)}")
    lines += _choices(grid)
    lines.append(f"  runs      {grid.runs}, {grid.finished} of them finished before; {jobs} at a time; into {grid.out}")
    lines.append(f"  steps     {_steps_text(grid)}")
    lines += [f"  note      {reason}" for reason in grid.not_reused]
    for name, parameters in grid.parameters.items():
        lines.append(f"            {name:<24} {parameters:>13,} parameters")
    for name, plan in grid.finetuning.items():
        lines += _finetuning_lines(name, plan)
    lines.append(
        f"  memory    about {human_bytes(grid.memory(jobs))} for weights, gradients and Adam's moments"
        f"{', and at most for what the network computes' if grid.finetuning else ''}; "
        f"disk {human_bytes(grid.disk(jobs))} at most"
    )
    lines += [f"  buffers   {kept}"] if kept else []
    return "\n".join(lines)


_FEW_VALIDATION = 30


def _steps_text(grid: "Grid") -> str:
    """How many examples a step has, and in which precision heads are trained; how to have float32."""
    runs = [run for _, runs in grid.parts for run in runs if run.head != "zero-shot"]
    if not runs:
        return "none"
    heads: dict[str, list[str]] = {}
    for head, precision in dict.fromkeys((run.head, run.settings.precision) for run in runs):
        heads.setdefault(precision, []).append(head)
    told = f"{runs[0].settings.batch_size} examples each (--batch-size), products in "
    told += "; ".join(f"{precision} ({', '.join(names)})" for precision, names in heads.items())
    return told + ("" if list(heads) == ["fp32"] else "; --precision fp32 for float32 alone")


def _finetuning_lines(name: str, plan: "FinetuningPlan") -> list[str]:
    """What is unfrozen, where its rows come from, and what is kept."""
    from featurestore.text import human_bytes

    frozen = sum(block.parameters for block in plan.blocks) - plan.parameters
    trained = [block.name for block in plan.trained]
    shown = ", ".join(trained if len(trained) < 5 else [*trained[:2], "…", *trained[-2:]])
    rows = []
    if plan.cached:
        rows.append(f"rows of {plan.part.start} from the cache")
    if plan.photographs:
        what = "pixels" if plan.part.first is None else f"rows of {plan.part.start}"
        read = f"{plan.photographs} photographs, read once for each run"
        rows.append(f"{what} of {read}, {human_bytes(plan.bytes_of_rows)} on the disk meanwhile")
    return [
        f"  finetune  {name}: unfrozen {shown} ({len(trained)} of {len(plan.blocks)} blocks), {plan.parameters:,} parameters; "
        f"{frozen:,} frozen",
        f"            begins with the trained head and {plan.weights}; {'; '.join(rows)}",
        f"            keeps the tuned network, {human_bytes(plan.network_bytes)} for each run",
    ]


def _kinds(about: "dict[str, Any]") -> list[str]:
    """Where some trials show one face twice: how many in each part. Those are easier, and survive a split by face more often."""
    twice = [
        (name, about.get(f"n_two_faces_{name}", 0), about[f"n_{name}"]) for name in ("train", "validation", "test")
    ]
    if all(n in (0, of) for _, n, of in twice):
        return []
    told = ", ".join(f"{n} of {of} in {name}" for name, n, of in twice)
    return [
        f"  note      trials that show one face twice: {told}; they are easier, so their accuracy is also given apart"
    ]


def _trials_text(about: "dict[str, Any]") -> str:
    """Which file, and enough of its hash to tell it from another of that name."""
    name, digest = about.get("trials_file", ""), about.get("trials_sha256", "")
    return f"{name} (sha256 {digest[:12]}…)" if digest else name


def _split_line(task: "Task") -> str:
    about = task.description()
    sizes = ", ".join(f"{name} {about[f'n_{name}']}" for name in ("train", "validation", "test"))
    left_out, aside = about["n_left_out"] - about["n_set_aside"], about["n_set_aside"]
    return (
        f"  split     {task.split.name}: {sizes}"
        + (f", {left_out} left out because they mix parts" if left_out else "")
        + (f", {aside} set aside because another part has their photograph under another key" if aside else "")
    )


def _ceiling_text(task: "Task", grid: "Grid") -> str:
    """Of all trials that will be tested: those of all folds."""
    import numpy as np

    from heads.scores import ceiling_scores

    tests = [other.split.indices("test") for other, _ in grid.parts if other.split.test == task.split.test]
    found = ceiling_scores(task.table.iloc[np.concatenate(tests)], None, task.chance, task.from_keys)
    if found["ceiling"] != found["ceiling"]:
        return f"unknown: {found['ceiling_note']}"
    return (
        f"{_with_interval(found, 'ceiling')}, of {found['n_repeated']} test answers to {found['n_triplets']} triplets, "
        "each against the other raters'"
    )


def _choices(grid: "Grid") -> list[str]:
    """Other ways to split, where they leave different numbers of trials."""
    if not grid.choices:
        return []
    rows = [f"  choices   {'':<34} {'train':>7} {'validation':>10} {'test':>7}"]
    rows += [
        f"            {as_typed(each.option):<34} {each.train:>7} {each.validation:>10} {each.test:>7}"
        + ("  suggested: its smallest part is largest, validation counted four times" if i == 0 else "")
        for i, each in enumerate(grid.choices)
    ]
    return rows


def faulty_file(grid: "Grid") -> Path:
    """Where trials that were left out are kept."""
    name = Path(str(grid.parts[0][0].about["trials_file"])).name
    return grid.out / f"faulty-{name.partition('.')[0]}.csv"


def progress_text(label: str, epoch: "Progress") -> str:
    """A line after an epoch, or about the pace of the first."""
    from featurestore.text import human_duration
    from heads.train import Pace, Preparation

    if isinstance(epoch, Preparation):
        return f"{label} | {epoch.done} of {epoch.total} photographs read"
    if isinstance(epoch, Pace):
        rate, takes = epoch.examples_per_second, human_duration(epoch.epoch_seconds)
        return f"{label} | {rate:,.{0 if rate >= 10 else 1}f} examples/s, about {takes} an epoch"
    return (
        f"{label} | epoch {epoch.epoch:>3}: loss {epoch.train_loss:.3f} train, {epoch.validation_loss:.3f} validation; "
        f"accuracy {epoch.train_accuracy:.3f}, {epoch.validation_accuracy:.3f}; {epoch.examples_per_second:,.0f}/s"
        f"{'  best' if epoch.best else ''}"
    )


def group_text(group: "pd.DataFrame") -> str:
    """One group of the summary as a person reads it, the lowest validation loss first."""
    import pandas as pd

    first = group.iloc[0]
    rows = pd.DataFrame([_summary_row(row) for row in group.to_dict("records")])
    has_ceiling = first["ceiling"] == first["ceiling"]
    if not has_ceiling:
        rows = rows.drop(columns=["repeated", "of ceiling"])
    if not rows["fine-tuned from"].any():
        rows = rows.drop(columns="fine-tuned from")
    if not 0 < first["n_two_faces"] < first["n_test"]:
        rows = rows.drop(columns=["two faces", "three faces"])
    is_triplet = group["head"].iloc[0] != "identity"
    what = "trials" if is_triplet else "photographs"
    tested = [
        str(first[name]) for name in ("test", "trials_file", "where", "sessions", "held_out", "weights") if first[name]
    ]
    fold = " in each fold" if first["n_folds"] > 1 else ""
    sizes = f" ({first['n_train']:.0f} trained on, {first['n_validation']:.0f} for validation{fold})"
    lines = [
        f"{first['n_test']} test {what}{sizes if first['n_train'] > 0 else ''}: {', '.join(tested)}",
        rows.to_string(index=False),
        f"Chance {first['chance']:.3f}. Intervals (95 %) and p (not corrected; see --compare) are over {first['clusters']}. "
        "Choose by validation loss, not by test.",
    ]
    if has_ceiling:
        ceiling = _with_interval(first.to_dict(), "ceiling")
        answers = f"{first['n_repeated']} test answers to {first['n_triplets']:.0f} repeated triplets"
        lines.append(f"Ceiling {ceiling}, from {answers}; `repeated` is accuracy on these.")
    if "two faces" in rows:
        lines.append(f"{first['n_two_faces']} of the trials show one face twice: `two faces` is accuracy on these.")
    notes = dict.fromkeys(note for note in group["ceiling_note"] if note and is_triplet)
    return "\n".join([*lines, *(f"Of ceiling: {note}." for note in notes)])


def _summary_row(row: "dict[str, Any]") -> dict[str, str]:
    trained = row["head"] != "zero-shot"
    gain = row.get("over_zero_shot", float("nan"))
    return {
        "layer": row["layer"],
        "head": row["head"],
        "fine-tuned from": _text(row.get("finetune_from")),
        "lr": f"{row['lr']:g}" if trained else "",
        "seeds": str(row["n_seeds"]) if trained else "",
        "validation loss": _number(row["validation_loss"]),
        "train": _number(row["train_accuracy"]),
        "test": _number(row["accuracy"]) + _interval(row["cluster_low"], row["cluster_high"]),
        "sd": _number(row["sd"]),
        "two faces": _with_interval(row, "accuracy_two_faces"),
        "three faces": _with_interval(row, "accuracy_three_faces"),
        "over zero-shot": (_number(gain, "+.3f") + _interval(row["over_low"], row["over_high"]))
        if gain == gain
        else "",
        "p": _number(row["p_zero_shot"], ".2g") if gain == gain else "",
        "repeated": _with_interval(row, "accuracy_repeated"),
        "of ceiling": _with_interval(row, "of_ceiling", ".2f"),
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _with_interval(row: "dict[str, Any]", name: str, form: str = ".3f") -> str:
    return _number(row[name], form) + _interval(row[f"{name}_low"], row[f"{name}_high"], form)


def _number(value: float, form: str = ".3f") -> str:
    return f"{value:{form}}" if value == value else ""


def _interval(low: float | None, high: float | None, form: str = ".3f") -> str:
    return "" if low is None or low != low else f" [{low:{form}}, {high:{form}}]"


def accuracy_text(result: "dict[str, Any]") -> str:
    """A finished run's accuracy: Wilson's interval, then that over faces and participants."""
    over = _interval(result["cluster_low"], result["cluster_high"])
    return f"test accuracy {result['accuracy']:.3f}{_interval(result['low'], result['high'])}" + (
        f"; over {result['clusters']}{over}" if over else ""
    )


def comparison_text(table: "pd.DataFrame") -> str:
    """All pairs, with what p is over."""
    lines = []
    for test, part in table.groupby("test", sort=False):
        shown = part.assign(
            accuracy=[
                f"{a:.3f}, {b:.3f}" for a, b in zip(part["accuracy_first"], part["accuracy_second"], strict=True)
            ],
            difference=[f"{row['difference']:+.3f}{_interval(row['low'], row['high'])}" for _, row in part.iterrows()],
            **{name: [_number(value, ".2g") for value in part[name]] for name in ("p", "p_holm", "p_mcnemar")},
        )
        columns = ["first", "second", "seeds", "accuracy", "difference", "p", "p_holm", "p_mcnemar"]
        over = part["clusters"].iloc[0]
        lines.append(f"{part['n_test'].iloc[0]} test trials, {test}; intervals (95 %) and p are over {over}")
        lines.append(shown[columns].rename(columns=lambda name: name.replace("_", " ")).to_string(index=False) + "\n")
    return "\n".join(
        [
            *lines,
            "p holm is corrected for the comparisons of the same test. p mcnemar takes trials for independent: where faces or "
            "participants differ it is too small.",
        ]
    )
