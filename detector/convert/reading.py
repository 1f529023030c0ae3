"""Files of mmdetection and detectron2, read without executing anything of them.

They hold more than tensors: notes of the training, numpy arrays.  What may be in them is listed here; anything else is
an error.  Objects that only the toolkit knows how to make are read as nothing.
"""

from __future__ import annotations

import ast
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from detector.errors import CheckpointError

Listed = list[tuple[Any, str]]


class Nothing:
    """Stands for an object that is of no use here: takes everything and keeps nothing."""

    def __new__(cls, *_: object, **__: object) -> Nothing:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


class _Dtype:
    """numpy's description of a kind of number."""

    def __init__(self, code: str, *_: object) -> None:
        self.numbers = np.dtype(code)
        if self.numbers.kind not in "fiub":
            raise pickle.UnpicklingError(f"an array of {self.numbers}, expected numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.numbers = self.numbers.newbyteorder(state[1])


class _Array:
    """A numpy array, made of its bytes alone."""

    def __init__(self, *_: object) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.value = _frombuffer(data, kind, shape, "F" if fortran else "C").value


def _frombuffer(data: bytes | str, kind: _Dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> _Array:
    found = _Array()
    data = data.encode("latin1") if isinstance(data, str) else data
    found.value = np.frombuffer(data, kind.numbers).reshape(shape, order=order)
    return found


def _scalar(kind: _Dtype, data: bytes | str) -> Any:
    value = _frombuffer(data, kind, (1,), "C").value
    assert value is not None
    return value[0].item()


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into pickles that Python 2 can read."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """How Python 3 writes no bytes at all into such pickles."""
    return b""


_KNOWN = {
    "__builtin__.bytes": _no_bytes,
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _latin1,
    "collections.OrderedDict": OrderedDict,
}


class _Arrays(pickle.Unpickler):
    """Containers, numbers, text and numpy arrays; nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _KNOWN[f"{module}.{name}"]


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Names and tensors of detectron2's model zoo: a pickle of numpy arrays, below `model` or alone.

    Raises:
        CheckpointError: missing, damaged, or holding anything but arrays, numbers and text.
    """
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="latin1").load()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such weights file") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a pickle of numpy arrays ({error}): damaged, or it holds code or objects, which are never run"
        ) from None
    except Exception as error:  # a damaged file makes the unpickler fail in any way
        raise CheckpointError(f"{path}: truncated, or not a weights file ({_first_line(error)}); get it anew") from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: expected names with arrays, found {type(content).__name__}")
    found = {}
    for key, value in content.items():
        if not isinstance(value, _Array) or value.value is None:
            raise CheckpointError(f"{path}: {key} is {type(value).__name__}, expected an array of numbers")
        native = value.value.astype(value.value.dtype.newbyteorder("="))  # a copy, which can be written to
        found[str(key)] = torch.from_numpy(np.ascontiguousarray(native))
    return found


# What the notes of mmdetection's training are made of.
_NOTES: Listed = [
    (Nothing, "mmengine.logging.history_buffer.HistoryBuffer"),
    (Nothing, "builtins.getattr"),  # of its methods, by name
    *(
        (Nothing, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
    (Nothing, "numpy.ndarray"),
    (Nothing, "numpy.dtype"),
    (Nothing, "_codecs.encode"),
]


def read_mmdetection(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Names and tensors of a checkpoint of mmdetection 2 or 3, and its `meta` ({} where there is none).

    Raises:
        CheckpointError: missing, damaged, or holding other objects than such files do.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        with torch.serialization.safe_globals(_NOTES):  # type: ignore[arg-type]  # pairs are allowed
            content = torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: damaged, or holds objects that are not read, since reading them could run code"
            f" ({_culprit(error)}): where you trust the file and have what it was made with, save the tensors alone,"
            " torch.save({'state_dict': torch.load(FILE, 'cpu', weights_only=False)['state_dict']}, NEW_FILE)"
        ) from None
    except Exception as error:  # a damaged file makes its reader fail in any way
        raise CheckpointError(f"{path}: truncated, or not a weights file ({_first_line(error)}); get it anew") from None
    meta = content.get("meta") if isinstance(content, dict) else None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: expected a state_dict of names with tensors; save the state_dict")
    return dict(state), meta if isinstance(meta, dict) else {}


def assignments(text: str) -> dict[str, Any]:
    """The values that a configuration of mmdetection assigns, as far as they are plain data; {} for other text.

    It is Python, but it is read, not run: `dict(...)`, lists, numbers and text are understood, other values are None.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return {
        node.targets[0].id: _plain(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


def _plain(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {word.arg: _plain(word.value) for word in node.keywords if word.arg is not None}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {k.value: _plain(v) for k, v in pairs if isinstance(k, ast.Constant)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_plain(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _culprit(error: Exception) -> str:
    """What torch stumbled over, without its advice to allow it."""
    words = str(error).split("GLOBAL ")
    return words[1].split(" ")[0] if len(words) > 1 else _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
