"""What every data source is: a frozen configuration that loads one :class:`Dataset`."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedq import random, registry
from fedq.errors import ConfigError

Array = NDArray[Any]
Labels = NDArray[np.int64]
Inputs = NDArray[np.float32]
Kind = Literal["image", "series", "spectrum", "features"]
#: What is learned, by the name of the registered task.
TaskName = Literal["classification", "regression", "reconstruction"]

#: What each kind looks like as stored.
LAYOUTS: Mapping[str, str] = {
    "image": "(N, H, W) or (N, H, W, C)",
    "series": "(N, T, C)",
    "spectrum": "(N, frames, bins)",
    "features": "(N, F)",
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Training and test examples in memory; made by :meth:`of`.

    Inputs stay as they are stored: channels last, in the source's dtype. Models get
    :meth:`train_inputs` and :meth:`test_inputs`: float32, channels first, scaled.

    Attributes:
      x_train: (N, ...) inputs as in :data:`LAYOUTS`.
      y_train: What the task is to say of them: (N,) classes, (N, k) numbers, or whether each is
        anomalous, its recording and its machine, (N, 3).
      x_test: (M, ...).
      y_test: (M, ...).
      classes: How many there are; 0 if the task is no classification.
      client_train: (N,) numbers of clients, if the data has any.
      kind: What an example is.
      task: Configuration of the registered task, as it travels in requests.
      references: Scores of trivial predictors on the test set, by name, such as
        ``persistence_mae``.

    Example:
      >>> x, y = np.zeros((6, 8, 8), np.uint8), np.array(list("abcabc"))
      >>> data = Dataset.of(x, y, x[:3], y[:3], kind="image")
      >>> data.input_shape, data.classes, data.y_test.tolist()
      ((1, 8, 8), 3, [0, 1, 2])
    """

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    classes: int
    client_train: Labels | None
    kind: Kind
    task: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "classification"})
    references: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        x_train: Array,
        y_train: Array,
        x_test: Array,
        y_test: Array,
        *,
        kind: Kind,
        client_train: Array | None = None,
        task: TaskName = "classification",
        references: Mapping[str, float] | None = None,
    ) -> Dataset:
        """Check the arrays of any source and number their labels.

        Args:
          x_train: (N, ...) inputs as in :data:`LAYOUTS`.
          y_train: Of a classification, (N,) integers or text; numbered 0..classes-1 in sorted
            order. Of a regression, (N,) or (N, k) numbers. Of a reconstruction, (N,) or (N, 3)
            integers: 0, and perhaps recording and machine.
          x_test: (M, ...) inputs of the same shape per example.
          y_test: (M, ...) likewise; labels must all occur in training, anomalies are 1.
          kind: What an example is.
          client_train: (N,) integers or text, an id per training example, or None.
          task: What is learned.
          references: Scores of trivial predictors.

        Raises:
          ConfigError: On anything that cannot be trained on.
        """
        for name, x in (("train", x_train), ("test", x_test)):
            _check_inputs(x, f"x_{name}", kind)
        if x_train.shape[1:] != x_test.shape[1:]:
            raise ConfigError(
                f"x_train holds examples of shape {x_train.shape[1:]}, "
                f"x_test of shape {x_test.shape[1:]}; they must be equal"
            )
        classes, options = 0, {}
        ys = (("y_train", y_train, len(x_train)), ("y_test", y_test, len(x_test)))
        if task == "classification":
            y_train, y_test, classes = _classes(ys)
        elif task == "regression":
            y_train, y_test = (_numbers(*y) for y in ys)
            if y_train.shape[1] != y_test.shape[1]:
                raise ConfigError(
                    f"y_train holds {y_train.shape[1]} numbers per example, y_test"
                    f" {y_test.shape[1]}; they must be equal"
                )
            deviation = float(y_train.std(dtype=np.float64))
            options = {"offset": float(y_train.mean(dtype=np.float64)), "divisor": deviation}
            if not 0 < deviation < np.inf:
                raise ConfigError("y_train is constant or too large; there is nothing to learn")
        else:
            y_train, y_test = (_anomalies(*y) for y in ys)
            if y_train[:, 0].any():
                raise ConfigError("y_train marks anomalies; train on normal examples alone")
            if len(np.unique(y_test[:, 0])) < 2:
                raise ConfigError("y_test needs both normal examples (0) and anomalies (1)")
        clients = None
        if client_train is not None:
            _check_ids(client_train, "client_train", len(x_train), "x_train")
            clients = np.unique(client_train, return_inverse=True)[1].astype(np.int64)
        return cls(
            x_train=x_train,
            y_train=y_train,
            x_test=x_test,
            y_test=y_test,
            classes=classes,
            client_train=clients,
            kind=kind,
            task={"name": task, **options},
            references=references or {},
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one model input: (C, H, W), (C, T), (1, frames, bins) or (F,)."""
        shape = self.x_train.shape[1:]
        if self.kind == "spectrum":
            return (1, *shape)
        if self.kind == "image":
            return (1, *shape) if len(shape) == 2 else (shape[2], *shape[:2])
        return shape[::-1] if self.kind == "series" else shape

    @property
    def outputs(self) -> int:
        """How many numbers a model is to give: classes, targets, or an input's values."""
        if self.task["name"] == "reconstruction":
            return int(np.prod(self.input_shape))
        return self.classes or int(self.y_train.shape[1])

    @property
    def strata(self) -> Labels:
        """(N,) what a partition may tell training examples apart by: classes, or nothing."""
        return self.y_train if self.classes else np.zeros(len(self.y_train), np.int64)

    def train_inputs(self, indices: NDArray[np.integer[Any]]) -> Inputs:
        """Return chosen training inputs, (len(indices), *input_shape) float32, contiguous."""
        return self._inputs(self.x_train[indices])

    def test_inputs(self) -> Inputs:
        """Return all test inputs, (M, *input_shape) float32, contiguous."""
        return self._inputs(self.x_test)

    @cached_property
    def scaling(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Offset and divisor of the stored inputs, broadcast over examples.

        uint8 images map to [0, 1]; all else is standardised per channel, bin or feature with the
        mean and deviation of the training inputs. A constant one maps to zero.
        """
        x = self.x_train
        if self.kind == "image" and x.dtype == np.uint8:
            return np.zeros(()), np.full((), 255.0)
        axes = tuple(range(x.ndim if self.kind == "image" and x.ndim == 3 else x.ndim - 1))
        constant = x.min(axis=axes) == x.max(axis=axes)
        with np.errstate(over="ignore", invalid="ignore"):
            mean, variance = _moments(x, axes)
        deviation = np.where(constant, 1.0, np.sqrt(variance))
        if not (np.isfinite(mean).all() and np.isfinite(deviation).all()):
            raise ConfigError("x_train holds values too large to standardise; rescale them")
        return mean, np.where(deviation > 0, deviation, 1.0)

    @cached_property
    def high(self) -> float:
        """The largest value that a training input takes, as models get it."""
        return max(float(self._inputs(block).max()) for block in _blocks(self.x_train))

    def _inputs(self, x: Array) -> Inputs:
        offset, divisor = self.scaling
        if offset.ndim == 0 and offset == 0:
            scaled = x.astype(np.float32)
            scaled /= np.float32(divisor)
        else:
            scaled = ((x - offset) / divisor).astype(np.float32)
        if self.kind == "image":
            scaled = scaled[:, None] if scaled.ndim == 3 else scaled.transpose(0, 3, 1, 2)
        elif self.kind == "spectrum":
            scaled = scaled[:, None]
        elif self.kind == "series":
            scaled = scaled.transpose(0, 2, 1)
        return np.ascontiguousarray(scaled)


class Data(abc.ABC):
    """Where examples come from.

    Subclasses are registered frozen dataclasses that implement :meth:`load`; use
    :func:`load`, which keeps what was loaded.
    """

    group: ClassVar[str] = "data"
    name: ClassVar[str]
    #: Constructor arguments that load in the law suite; empty where files or packages are needed.
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @abc.abstractmethod
    def load(self) -> Dataset:
        """Read the examples.

        Raises:
          ConfigError: If the source is missing or holds what cannot be trained on.
        """


@cache
def load(data: Data) -> Dataset:
    """Return the data set of a configuration, read once per process.

    >>> from fedq import build
    >>> load(build("data", "digits")) is load(build("data", "digits"))
    True
    """
    return data.load()


def of_node(node: Mapping[str, Any]) -> Data:
    """Return the data set that a device's own configuration names: ``data``, ``data-OPTION``.

    >>> of_node({"data": "npz", "data-path": "own.npz", "partition-id": 3}).path
    'own.npz'
    """
    options = {
        key.removeprefix("data-").replace("-", "_"): value
        for key, value in node.items()
        if key.startswith("data-")
    }
    data: Data = registry.build("data", str(node["data"]), **options)
    return data


def stratified(y: Array, test_fraction: float, seed: int) -> tuple[Labels, Labels]:
    """Split rows by class: indices of training and test rows, each sorted.

    Every class gives ``round(test_fraction * count)`` rows to the test set, but at least one, and
    keeps at least one.

    >>> train, test = stratified(np.repeat([0, 1], [80, 20]), 0.25, seed=0)
    >>> len(train), len(test)
    (75, 25)
    """
    rng = random.generator(random.derive(seed, "split"))
    held = np.zeros(len(y), bool)
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        if len(rows) < 2:
            raise ConfigError(f"class '{label}' has a single example; a split needs two")
        count = min(max(round(test_fraction * len(rows)), 1), len(rows) - 1)
        held[rng.permutation(rows)[:count]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def check_fraction(value: float, option: str) -> None:
    """Raise :class:`ConfigError` unless ``value`` lies strictly between 0 and 1."""
    if not 0 < value < 1:
        raise ConfigError(f"{option} must lie strictly between 0 and 1, not {value}")


def _blocks(x: Array) -> Iterator[Array]:
    """Yield the rows in blocks: no temporary is as large as the data."""
    for start in range(0, len(x), 1024):
        yield x[start : start + 1024]


def _moments(x: Array, axes: tuple[int, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    count = np.prod([x.shape[axis] for axis in axes], dtype=np.float64)
    mean = sum(block.sum(axis=axes, dtype=np.float64) for block in _blocks(x)) / count
    variance = sum(np.square(block - mean).sum(axis=axes) for block in _blocks(x)) / count
    return np.asarray(mean), np.asarray(variance)


def _check_inputs(x: Array, name: str, kind: Kind) -> None:
    if x.dtype.kind not in "buif":
        raise ConfigError(f"{name} must hold numbers, not {x.dtype}")
    if x.ndim not in {"image": (3, 4), "series": (3,), "spectrum": (3,), "features": (2,)}[kind]:
        raise ConfigError(f"{name} must have shape {LAYOUTS[kind]}, not {x.shape}")
    if x.size == 0:
        raise ConfigError(f"{name} is empty: its shape is {x.shape}")
    if kind == "image" and x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] > 4:
        raise ConfigError(
            f"{name} of shape {x.shape} looks channels-first; store images as {LAYOUTS['image']}"
        )
    if x.dtype.kind == "f" and not all(np.isfinite(block).all() for block in _blocks(x)):
        raise ConfigError(f"{name} holds NaN or infinity; clean or drop those examples")


def _classes(ys: Sequence[tuple[str, Array, int]]) -> tuple[Labels, Labels, int]:
    """Return both halves' labels as numbers, and how many classes there are."""
    for name, y, rows in ys:
        _check_ids(y, name, rows, name.replace("y", "x", 1))
    (_, y_train, _), (_, y_test, _) = ys
    if y_train.dtype.kind in "iu" and y_test.dtype.kind in "iu":
        known, y = np.unique(y_train, return_inverse=True)
    else:  # compared as text, so that "3" and 3 are one class
        known, y = np.unique(y_train.astype(str), return_inverse=True)
        y_test = y_test.astype(str)
    unseen = np.setdiff1d(y_test, known)
    if unseen.size:
        raise ConfigError(
            f"y_test holds labels that y_train does not: {_some(unseen)}; "
            "add training examples or drop these"
        )
    if known.size < 2:
        raise ConfigError("y_train holds a single class; classification needs at least two")
    return y.astype(np.int64), np.searchsorted(known, y_test).astype(np.int64), int(known.size)


def _numbers(name: str, y: Array, rows: int) -> Inputs:
    """Return (rows, k) float32 of (rows,) or (rows, k) numbers."""
    if y.dtype.kind not in "buif":
        raise ConfigError(f"{name} must hold numbers, not {y.dtype}")
    if y.ndim not in (1, 2) or len(y) != rows or y.size == 0:
        raise ConfigError(f"{name} must have shape ({rows},) or ({rows}, k), not {y.shape}")
    with np.errstate(over="ignore"):
        numbers = y.reshape(rows, -1).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise ConfigError(f"{name} holds NaN, infinity or too large numbers; clean those examples")
    return numbers


def _anomalies(name: str, y: Array, rows: int) -> Labels:
    """Return (rows, 3): whether each is anomalous, its recording (by default its own), machine."""
    if y.dtype.kind not in "iub":
        raise ConfigError(f"{name} must hold integers: 0 for normal, 1 for anomalies")
    if y.shape not in ((rows,), (rows, 3)):
        raise ConfigError(f"{name} must have shape ({rows},) or ({rows}, 3), not {y.shape}")
    if y.ndim == 1:
        y = np.stack([y, np.arange(rows), np.zeros(rows, np.int64)], axis=1)
    if not np.isin(y[:, 0], (0, 1)).all():
        raise ConfigError(f"{name} must be 0 for normal examples and 1 for anomalies")
    return y.astype(np.int64)


def _check_ids(ids: Array, name: str, rows: int, of: str) -> None:
    if ids.dtype.kind not in "iuUb":
        raise ConfigError(f"{name} must hold integers or text, not {ids.dtype}")
    if ids.ndim != 1:
        raise ConfigError(f"{name} must have shape (N,), one class or id per row, not {ids.shape}")
    if len(ids) != rows:
        raise ConfigError(f"{of} has {rows} rows but {name} has {len(ids)}")


def _some(values: Array) -> str:
    text = ", ".join(map(str, values[:5].tolist()))
    return text + (", ..." if len(values) > 5 else "")
