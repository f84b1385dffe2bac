"""What public functions are called with: held against their annotations, in one place.

A value of the wrong type would fail where it is used, deep inside and late, or be taken for what it
is not: a text for a list of patterns, "no" for a truth. What a value has to be beyond its type (a
size, the name of a model) is for the function itself to say. Thread-safe.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property, wraps
from numbers import Integral, Real
from re import Pattern
from types import FunctionType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from typing_extensions import Unpack

__all__ = ["check_call", "checked"]

T = TypeVar("T", bound=Callable[..., Any])

_LONGEST = 40  # characters of a value in a message
_SHOWN = (str, bytes, int, float)  # whose values are short, and say what was meant


def checked(target: T) -> T:
    """Have a function, or the public methods of a class, refuse arguments of wrong types.

    They raise TypeError then, which names the function, the argument and the value; for an option
    that they do not have, with the nearest that they have. A number of the caller's library (of
    numpy) is a number; a truth is none, and a number is no truth. Annotations whose names are not
    there at run time are not checked.
    """
    if isinstance(target, type):
        for name, method in list(vars(target).items()):
            if isinstance(method, FunctionType) and (name == "__init__" or name[0] != "_"):
                setattr(target, name, checked(method))
        return cast(T, target)
    parameters = _Parameters(target)

    @wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        parameters.check(args, kwargs)
        return target(*args, **kwargs)

    call._penstock_parameters = parameters  # type: ignore[attr-defined]
    return cast(T, call)


def check_call(function: Callable[..., Any], *args: object, **kwargs: object) -> None:
    """Refuse what a checked function would refuse, without calling it."""
    function._penstock_parameters.check(args, kwargs)  # type: ignore[attr-defined]


class _Parameters:
    """The annotations of one function, read when it is first called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError where a value does not fit, one is lacking, or an option is unknown."""
        positional, rest, keywords, others = self._hints
        if rest is None and len(args) > len(positional):
            by_name = [each for each in keywords if each not in dict(positional)]
            raise TypeError(
                f"{self._name(args)} takes no more than {', '.join(self._told(positional))} by "
                f"place, and others by name: {', '.join(by_name) or 'there are none'}"
            )
        lacking = {*self._required[len(args) :], *self._required_by_name} - kwargs.keys()
        if lacking:
            raise TypeError(f"{self._name(args)} needs {', '.join(sorted(lacking))}")
        given = [*zip(positional, args, strict=False)]
        if rest is not None:
            given += [(rest, value) for value in args[len(positional) :]]
        for name, value in kwargs.items():
            hint = keywords.get(name, others)
            if hint is None:
                raise TypeError(self._unknown(name, args, keywords))
            given.append(((name, hint), value))
        for (name, hint), value in given:
            if not _fits(value, hint):
                found = type(value).__name__
                if isinstance(value, _SHOWN):
                    found += f" {value!r:.{_LONGEST}}"
                if isinstance(value, str) and _fits([value], hint):
                    found += f": write [{value!r}]"
                wanted = " or ".join(dict.fromkeys(_describe(hint)))
                raise TypeError(f"{self._name(args)}: {name} is {wanted}, not {found}")

    @cached_property
    def _hints(
        self,
    ) -> tuple[list[tuple[str, Any]], tuple[str, Any] | None, dict[str, Any], Any]:
        """Hints of positional arguments, of the rest, by keyword, and of other keywords, if any."""
        positional: list[tuple[str, Any]] = []
        keywords: dict[str, Any] = {}
        rest, others = None, None
        for name, parameter in inspect.signature(self._function).parameters.items():
            hint = self._resolve(parameter.annotation)
            if parameter.kind is parameter.VAR_POSITIONAL:
                rest = (name, hint)
            elif parameter.kind is not parameter.VAR_KEYWORD:
                if parameter.kind is not parameter.KEYWORD_ONLY:
                    positional.append((name, hint))
                keywords[name] = hint
            elif getattr(hint, "__origin__", None) is Unpack:
                keywords |= self._options(get_args(hint)[0])
            else:
                others = hint
        return positional, rest, keywords, others

    @cached_property
    def _required(self) -> list[str]:
        """Names of those that may be given by place and have no default."""
        return [each.name for each in self._parameters if each.kind is not each.KEYWORD_ONLY]

    @cached_property
    def _required_by_name(self) -> list[str]:
        return [each.name for each in self._parameters if each.kind is each.KEYWORD_ONLY]

    @cached_property
    def _parameters(self) -> list[inspect.Parameter]:
        """Those without a default."""
        return [
            each
            for each in inspect.signature(self._function).parameters.values()
            if each.default is each.empty
            and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        ]

    @staticmethod
    def _told(positional: Sequence[tuple[str, Any]]) -> list[str]:
        return [name for name, _ in positional if name != "self"] or ["nothing"]

    def _options(self, record: type) -> dict[str, Any]:
        """Return the hints of a TypedDict, each in the scope of the class that has it."""
        found: dict[str, Any] = {}
        for base in getattr(record, "__orig_bases__", ()):
            if base is not record and hasattr(base, "__annotations__"):
                found |= self._options(base)
        scope = vars(inspect.getmodule(record))
        for name, hint in record.__annotations__.items():
            text = getattr(hint, "__forward_arg__", hint)
            found[name] = self._resolve(text, scope)
        return found

    def _resolve(self, hint: Any, scope: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        if hint is inspect.Parameter.empty:
            return Any
        if not isinstance(hint, str):
            return hint
        try:
            return eval(hint, scope or inspect.unwrap(self._function).__globals__)
        except NameError:  # imported for types alone
            return Any

    def _name(self, args: Sequence[object]) -> str:
        """Return how the caller knows the function: a method by the class of its object."""
        name = self._function.__name__
        if "." not in self._function.__qualname__.rpartition("<locals>.")[2] or not args:
            return name
        owner = type(args[0]).__name__
        return owner if name == "__init__" else f"{owner}.{name}"

    def _unknown(self, name: str, args: Sequence[object], keywords: Mapping[str, Any]) -> str:
        known = [each for each in keywords if each != "self"]
        near = get_close_matches(name, known, 1)
        meant = f"; did you mean {near[0]!r}?" if near else "."
        return f"{self._name(args)} has no argument {name!r}{meant} It has {', '.join(known)}"


def _fits(value: object, hint: Any) -> bool:  # noqa: ANN401
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:  # which of them, the function says
        return isinstance(value, tuple({type(each) for each in inner}))
    if isinstance(hint, TypeVar):
        return _fits(value, hint.__bound__ or Any)
    if hint in (None, NoneType):
        return value is None
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if origin is type:
        return isinstance(value, type) and issubclass(value, inner[0])
    if origin is Sequence:
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            return False
        simple = inner[0] in (str, int) or get_origin(inner[0]) in (Union, UnionType)
        return not simple or all(_fits(each, inner[0]) for each in value)
    if origin is Pattern:
        return isinstance(value, Pattern) and isinstance(value.pattern, inner[0])
    if origin is not None and origin is get_origin(Callable[..., Any]):
        return callable(value)
    if getattr(hint, "_is_protocol", False) and origin is None:
        wanted = [name for name in vars(hint) if name[0] != "_"]
        return all(callable(getattr(value, name, None)) for name in wanted)
    return isinstance(value, origin or hint)


def _describe(hint: Any) -> Iterator[str]:  # noqa: ANN401
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for each in inner:
            yield from _describe(each)
    elif origin is Literal:
        yield from map(repr, inner)
    elif isinstance(hint, TypeVar):
        yield from _describe(hint.__bound__ or object)
    elif hint in (None, NoneType):
        yield "None"
    elif origin is type:
        yield f"a class of {inner[0].__name__}"
    elif origin is Sequence:
        yield f"a list of {' or '.join(_describe(inner[0]))}"
    elif origin is not None and origin is get_origin(Callable[..., Any]):
        yield "a function"
    elif getattr(hint, "_is_protocol", False) and origin is None:
        yield f"a {hint.__name__} (has {', '.join(n for n in vars(hint) if n[0] != '_')})"
    else:
        yield (origin or hint).__name__
