"""The error for data that cannot be used, and words for its messages."""
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class DataError(ValueError):
    """Data that cannot be used; the message names the file."""


@contextmanager
def one_message() -> Iterator[None]:
    """End the program with the message of a :class:`DataError` alone.

    Raises:
        SystemExit: In its place. The traceback that torch puts in front of
            an error from a worker process is left out.
    """
    try:
        yield
    except DataError as error:
        mark = f'{DataError.__name__}: '
        raise SystemExit(str(error).rpartition(mark)[2].strip()) from error


def describe(data_set: Any) -> str:
    """Name a data set in a message: its class and what it reads."""
    prefix = getattr(data_set, 'data_prefix', None) or {}
    paths = [getattr(data_set, 'ann_file', None),
             *(prefix.values() if isinstance(prefix, dict) else [prefix])]
    return (f'{type(data_set).__name__} '
            f'({", ".join(str(path) for path in paths if path)})')


def some_of(values: list, count: int = 20) -> str:
    """The first of a list, as text."""
    return (', '.join(repr(value) for value in values[:count]) +
            (f', ... ({len(values)})' if len(values) > count else ''))
