"""Conditions on the columns of a table: comparisons, which pandas evaluates. Nothing in them is called."""

import ast
import re
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.text import near_matches, shortened

_LONGEST, _MOST_NAMES = 100_000, 500  # characters, and columns named in one condition, each as often as it is
_LARGEST_POWER = 10
# Text in quotes, a column in backticks, and & and |, which bind as loosely as ``and`` and ``or`` in pandas.
_PIECES = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|`([^`]*)`|&|\|", re.DOTALL)
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn)
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
_ALLOWED = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.Invert, ast.UAdd, ast.USub),
    *(ast.Compare, *_COMPARISONS, ast.BinOp, *_ARITHMETIC, ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple),
)
_EXAMPLE = 'It is a comparison such as "gender == \'female\'" or "yaw <= 30".'


def rows_that_meet(condition: str, table: pd.DataFrame) -> np.ndarray:
    """bool per row: whether a condition on the columns or index of ``table`` is true.

    It is made of comparisons, ``in``, ``and``, ``or``, ``not`` (or ``&``, ``|``, ``~``), columns (in backticks where the name
    is none in Python), numbers and arithmetic of them, text, and lists. FeatureStoreError for anything else, such as a
    call; if it cannot be evaluated, is no condition, or compares text with a number, which never are equal.
    """
    frame = table.reset_index() if table.index.names[0] else table
    shown = f"`where` {shortened(repr(condition), 200)}"
    expression, quoted = _without_backticks(condition)
    tree = _parsed(expression, shown)
    columns = {str(name): name for name in frame.columns}
    called = {node.id: quoted.get(node.id, node.id) for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for name in called.values():
        if name not in columns and name != "index":
            raise FeatureStoreError(
                f"{shown} cannot be evaluated: name {shortened(name)!r} is not defined. {near_matches(name, columns)} {_EXAMPLE}"
            )
    named = {ours: frame[columns[name]] for ours, name in called.items() if name in columns}
    texts = {name: values for name, values in named.items() if not pd.api.types.is_numeric_dtype(values)}
    _refuse_arithmetic(tree, texts, shown)
    for node in ast.walk(tree):
        column = _compared_with_number(node, texts)
        if column is not None:
            such = f", such as {shortened(repr(texts[column].iloc[0]))}" if len(frame) else ""
            raise FeatureStoreError(
                f"{shown} compares {shortened(called[column])} with a number, but it holds text{such}. Put the number in quotes."
            )
    try:
        held = pd.DataFrame(named, frame.index).eval(expression)
    except Exception as error:  # whatever an expression can raise is the user's to read
        reason = shortened(f"{type(error).__name__}: {error}", 200)
        raise FeatureStoreError(f"{shown} cannot be evaluated: {reason}. {_EXAMPLE}") from None
    if isinstance(held, pd.Series) and isinstance(held.dtype, pd.BooleanDtype):
        held = held.to_numpy(bool, na_value=False)  # what is missing meets no condition
    held = np.asarray(held)
    if held.dtype != bool or held.shape != (len(frame),):
        raise FeatureStoreError(
            f"{shown} is no condition: it gives {held.dtype}, not true or false. Compare with ==, <, in …: "
            "\"gender == 'female'\"."
        )
    return held


def _without_backticks(condition: str) -> tuple[str, dict[str, str]]:
    """The condition as Python can parse it, and the columns in backticks by the names that stand for them in it."""
    stem = "column_"
    while stem in condition:
        stem += "_"
    quoted: dict[str, str] = {}

    def piece(match: re.Match[str]) -> str:
        if match[1] is None:
            return {"&": " and ", "|": " or "}.get(match[0], match[0])
        return quoted.setdefault(match[1], f"{stem}{len(quoted)}")

    return _PIECES.sub(piece, condition).strip(), {ours: name for name, ours in quoted.items()}


def _parsed(expression: str, shown: str) -> ast.Expression:
    """FeatureStoreError for what is no expression, and for anything but what a condition is made of."""
    if len(expression) > _LONGEST:
        raise FeatureStoreError(f"{shown} has {len(expression):,} characters, and may have {_LONGEST:,}.")
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply, or holds a NUL character"
        raise FeatureStoreError(
            f"{shown} is no condition and cannot be evaluated: {shortened(reason, 200)}. {_EXAMPLE}"
        ) from None
    for node in ast.walk(tree):
        text_or_number = not isinstance(node, ast.Constant) or isinstance(node.value, str | int | float | None)
        if not isinstance(node, _ALLOWED) or not text_or_number:
            raise _refused(
                shown, f"holds {shortened(ast.get_source_segment(expression, node) or type(node).__name__)!r}"
            )
    if sum(isinstance(node, ast.Name) for node in ast.walk(tree)) > _MOST_NAMES:
        raise FeatureStoreError(
            f"{shown} names columns more than {_MOST_NAMES} times. Choose from lists: face_id in [...]."
        )
    return tree


def _refuse_arithmetic(tree: ast.Expression, texts: Mapping[str, object], shown: str) -> None:
    """FeatureStoreError for arithmetic that is none of numbers, or whose result could be of any length."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.BinOp):
            continue
        for side in (node.left, node.right):
            text = isinstance(side, ast.Constant) and not isinstance(side.value, int | float)
            if text or isinstance(side, ast.List | ast.Tuple) or (isinstance(side, ast.Name) and side.id in texts):
                raise _refused(shown, "does arithmetic with text or a list")
        if isinstance(node.op, ast.Pow):
            small = _is_number(node.right) and abs(ast.literal_eval(node.right)) <= _LARGEST_POWER
            if not small or any(isinstance(inner, ast.Pow) for inner in ast.walk(node.left)):
                raise _refused(shown, f"has a power other than by a number up to {_LARGEST_POWER}, or of a power")


def _refused(shown: str, why: str) -> FeatureStoreError:
    return FeatureStoreError(
        f"{shown} {why}. A condition consists of columns, numbers, text and lists of them, compared by ==, !=, <, <=, >, >=, in "
        f"and not in, of arithmetic of numbers (+ - * / // % **), and of and, or, not. {_EXAMPLE}"
    )


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool)


def _compared_with_number(node: ast.AST, texts: Mapping[str, object]) -> str | None:
    """The column of text that ``node`` compares with a number or a list of them, if it does."""
    if not isinstance(node, ast.Compare):
        return None
    sides = [node.left, *node.comparators]
    for pair in pairwise(sides):
        for one, other in (pair, pair[::-1]):
            values = other.elts if isinstance(other, ast.List | ast.Tuple) else [other]
            if isinstance(one, ast.Name) and one.id in texts and any(map(_is_number, values)):
                return one.id
    return None
