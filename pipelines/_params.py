"""Types of options that click does not have."""

import re
from typing import Any

import click
from click.shell_completion import CompletionItem


class Expression(click.ParamType):  # type: ignore[type-arg]
    """Text that is taken as it is, commas included."""

    name = "EXPR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As given."""
        return str(value)


class Pairs(click.ParamType):  # type: ignore[type-arg]
    """SESSION=VALUE."""

    name = "SESSION=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """The two sides."""
        left, equals, right = value.partition("=")
        if not (left and equals and right):
            self.fail(f"{value!r} is not SESSION=VALUE, such as 2D=frontal", param, ctx)
        return left, right


class Finite(click.ParamType):  # type: ignore[type-arg]
    """A finite number, above zero or from zero on."""

    name = "number"

    def __init__(self, zero: bool) -> None:
        self.zero = zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As a float."""
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not (0 < number < float("inf") or (self.zero and number == 0)):
            self.fail(f"{value!r} is not a number {'from' if self.zero else 'above'} zero", param, ctx)
        return number


class Rank(click.ParamType):  # type: ignore[type-arg]
    """A number, or ``full``."""

    name = "N|full"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """None for a full matrix."""
        if value == "full":
            return None
        try:
            return int(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is neither a number nor `full`", param, ctx)


class Device(click.ParamType):  # type: ignore[type-arg]
    """``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; whether it is there is asked later."""

    name = "auto|cpu|cuda|cuda:N|mps"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As given."""
        if not re.fullmatch(r"auto|cpu|cuda|mps|cuda:[0-9]{1,3}", str(value)):
            self.fail(f"{value!r} is not one of auto, cpu, cuda, mps, or cuda:N, such as cuda:1", param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The names without a number."""
        return [CompletionItem(name) for name in ("auto", "cpu", "cuda", "mps") if name.startswith(incomplete)]
