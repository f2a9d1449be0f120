"""Tuples of tuples in a pickle: what is hashed as a key, or written into an error, takes as long as they are large."""

import pickletools
from typing import Any, NamedTuple

_DEEPEST = 100  # Python's hash of a tuple recurses in C without a limit: about 50,000 end the process
_LARGEST = (
    1 << 16
)  # values in tuples of tuples, each as often as it is there: ten times itself, eight times over, is a day's hash
_MOST_HASHED = 1 << 25  # values in keys and members altogether, each as often as it is there: half a second
_LONGEST_NAME = 1000  # torch's message on a class that it does not know takes the square of its name's length
_MARK = pickletools.markobject
_CHANGING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ"}
_HOLDING = {
    "APPEND",
    "APPENDS",
    "LIST",
    "SETITEM",
    "SETITEMS",
    "DICT",
    "ADDITEMS",
    "FROZENSET",
}  # a dict may be made of a list


class _Value(NamedTuple):
    """What is on the stack: how deep and large its hash is, whether a list, dict or set is in it, and whether long text is."""

    depth: int = 0
    size: int = 1
    mutable: bool = False
    long: bool = False


_LEAF, _CONTAINER, _TEXT = _Value(), _Value(mutable=True), _Value(long=True)


def refuse_nesting(content: Any) -> None:
    """Nothing of one pickle is built, and what is in it is compared with these limits; ``content`` is bytes or a file.

    ValueError for one whose hash or text would not end, or would end the process, and for a length that the file does not hold.
    Other exceptions for a damaged one.
    """
    stack: list[_Value | None] = []  # None is a mark
    memo: dict[int, _Value | None] = {}
    hashed = 0
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            stack.append(None)
        elif name == "POP":
            stack.pop()
        else:
            parts = _popped(stack, opcode)
            hashed += sum(part.size - 1 for part in parts[name in _CHANGING :]) if name in _HOLDING else 0
            if hashed > _MOST_HASHED:
                raise ValueError(f"more than {_MOST_HASHED} values in tuples that are keys, or in lists")
            if opcode.stack_after:
                stack.append(parts[0] if name in _CHANGING else _made(name, parts, argument))


def _popped(stack: list[_Value | None], opcode: pickletools.OpcodeInfo) -> list[_Value]:
    """Takes from the stack what the operation takes."""
    before = opcode.stack_before
    if _MARK in before:
        mark = len(stack) - 1
        while stack[mark] is not None:  # IndexError where there is no mark
            mark -= 1
        first = mark - before.index(_MARK)
    else:
        first = len(stack) - len(before)
    if first < 0:
        raise ValueError(f"{opcode.name} asks for what is not there")
    parts = [value for value in stack[first:] if value is not None]
    del stack[first:]
    return parts


def _made(name: str, parts: list[_Value], argument: Any) -> _Value:
    if name in ("EMPTY_LIST", "LIST", "EMPTY_DICT", "DICT", "EMPTY_SET"):
        return _CONTAINER  # it has no hash
    if isinstance(argument, str | bytes | bytearray) and len(argument) > _LONGEST_NAME:
        if name in ("GLOBAL", "INST"):
            raise ValueError(f"the name of a class has {len(argument):,} letters")
        return _TEXT
    if not parts:
        return _Value(size=1 + argument.bit_length() // 32) if isinstance(argument, int) else _LEAF
    made = _Value(
        1 + max((part.depth for part in parts), default=-1),
        1 + sum(part.size for part in parts),
        any(part.mutable for part in parts),
        any(part.long for part in parts),
    )
    if made.depth > _DEEPEST or (made.depth > 1 and made.size > _LARGEST):
        raise ValueError(f"tuples within tuples, more than {_DEEPEST} deep or of more than {_LARGEST} values")
    if name == "BINPERSID" and made.mutable:
        raise ValueError("a list is where a tensor's numbers should be named")
    if (name in _CALLS and (parts[0].mutable or parts[0].long)) or (name == "STACK_GLOBAL" and made.long):
        raise ValueError("a list or long text is where a class or function should be")
    return made._replace(long=False) if name == "BINPERSID" else made  # a module is kept with its source
