"""Checks of arguments that the studies share; each raises ValueError with "name: what was given, what is wanted".

Public functions call them on NumPy arrays and plain numbers, never on what jax or torch traces.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral

import numpy as np
import pandas as pd
from numpy.typing import NDArray

AXES = ("row", "column", "entry", "entry")


def one_of(name: str, given: object, allowed: Iterable[str]) -> None:
    """Refuse what is not among `allowed`; the message names the nearest allowed value."""
    names = list(allowed)
    if not isinstance(given, str) or given not in names:
        near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: {given!r} given, one of {', '.join(names)} wanted{hint}")


def count(name: str, value: object, least: int = 1, most: int = 2**63 - 1) -> int:
    """Return an integer between `least` and `most`; True and 3.0 are none."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        bound = f" and at most {most}" if most < 2**63 - 1 else ""
        raise ValueError(f"{name}: {value!r} given, an integer of at least {least}{bound} wanted")
    return int(value)


def seed(name: str, value: object) -> int:
    """Return a seed: an integer that both NumPy and scikit-learn take. None would give other numbers every time."""
    return count(name, value, 0, 2**32 - 1)


def number(name: str, value: object, above: float = -np.inf, below: float = np.inf, *, or_equal: bool = False) -> float:
    """Return a finite number between two bounds; `or_equal` lets the lower one in too."""
    array = array_of(name, value)
    if array.ndim or array.dtype.kind not in "iuf" or not (above < array < below or (or_equal and array == above)):
        low = f" {'of at least' if or_equal else 'above'} {above:g}" if above > -np.inf else ""
        high = f" and below {below:g}" if below < np.inf else ""
        raise ValueError(f"{name}: {value} given, a finite number{low}{high} wanted")
    return float(array)


def array_of(name: str, value: object) -> NDArray:
    """Return `value` as an array of whatever type; refuses masked values, which NumPy would use as if they were not."""
    parts = [value, *value] if isinstance(value, list | tuple) else [value]
    if any(np.ma.is_masked(part) for part in parts):
        raise ValueError(f"{name}: masked values given, none wanted; leave those rows out (.compressed())")
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: {type(value).__name__} given, an array of numbers wanted ({error})") from error


def numbers(
    name: str, value: object, ndim: int = 1, *, least: int = 1, width: int | None = None, finite: bool | None = True
) -> NDArray[np.float64]:
    """Return a float64 array of `ndim` axes with `least` rows or more, and `width` entries along the last axis.

    Infinity is refused where `finite`, NaN unless that is None.
    """
    array = array_of(name, value)
    short = array.ndim != ndim or len(array) < least or (least and not array.size)
    if short or (width is not None and array.shape[-1] != width):
        axes = ", ".join([*AXES[: ndim - 1], AXES[ndim - 1] if width is None else str(width)]) + "," * (ndim == 1)
        rows = f" with {least} row{'s' * (least != 1)} or more" if ndim > 1 or width is None else ""
        raise ValueError(f"{name}: shape {array.shape} given, ({axes}){rows} wanted")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: {array.dtype} given, real numbers wanted")
    array = array.astype(np.float64, copy=False)
    wrong = ~np.isfinite(array) if finite else np.isnan(array)
    if wrong.any() and finite is not None:
        what = "NaN or infinite" if finite else "NaN"
        raise ValueError(f"{name}: {what} at {int(wrong.sum())} of {array.size} entries, none wanted")
    return array


def integers(name: str, value: object, *, below: int, length: int | None = None) -> NDArray[np.int64]:
    """Return integers from 0 to `below` − 1, such as the classes of examples, `length` of them if that is given."""
    array, kind = numbers(name, value), np.asarray(value).dtype
    if kind.kind not in "iu" or length not in (None, len(array)):
        raise ValueError(f"{name}: shape {array.shape} of {kind} given, ({length or 'row'},) integers wanted")
    if not (array.min() >= 0 and array.max() < below):
        raise ValueError(f"{name}: {array.min():g} to {array.max():g} given, classes 0 to {below - 1} wanted")
    return np.asarray(value, dtype=np.int64)


def labels(name: str, value: object, *, least: int = 1) -> NDArray[np.bool_]:
    """Return a column of true and false; 1 and 0 are taken for them, NaN and text are not."""
    array = numbers(name, value, least=least)
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name}: values {array.min():g} to {array.max():g} given, only true/false (or 1/0) wanted")
    return array.astype(bool)


def groups(name: str, value: object) -> NDArray[np.int64]:
    """Return the number of each row's group, in the order of the groups' names; refuses rows that have none."""
    array = array_of(name, value)
    if array.ndim != 1:
        raise ValueError(f"{name}: shape {array.shape} given, (row,) wanted")
    codes = pd.factorize(array, sort=True)[0]
    if (codes < 0).any():
        raise ValueError(f"{name}: {int((codes < 0).sum())} of {len(codes)} rows have no group, none such wanted")
    return codes.astype(np.int64)


def same_rows(**columns: object) -> None:
    """Refuse columns of several lengths, and pandas objects of other rows: they would be paired by position."""
    names = " and ".join(columns)
    lengths = [str(*array_of(name, column).shape[:1]) or "no" for name, column in columns.items()]
    if len(set(lengths)) > 1:
        raise ValueError(f"{names}: {', '.join(lengths)} rows given, one length wanted")
    indexes = [column.index for column in columns.values() if isinstance(column, pd.Series | pd.DataFrame)]
    if not all(index.equals(indexes[0]) for index in indexes):
        wanted = "the same rows in the same order wanted; align them, or pass .to_numpy() to pair them by position"
        raise ValueError(f"{names}: pandas indexes that differ given, {wanted}")


def symmetric(name: str, value: object, tolerance: float = 1e-6) -> NDArray[np.float64]:
    """Return a square matrix that is symmetric up to `tolerance` times its largest entry."""
    matrix = numbers(name, value, 2)
    square = matrix.shape[0] == matrix.shape[1]
    if not square or np.abs(matrix - matrix.T).max() > tolerance * np.abs(matrix).max():
        raise ValueError(f"{name}: {'not symmetric' if square else matrix.shape} given, a symmetric matrix wanted")
    return matrix
