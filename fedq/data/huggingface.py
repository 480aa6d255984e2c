"""Data sets of the Hugging Face hub, through Flower Datasets, https://flower.ai/docs/datasets."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.data._media import stack_images
from fedq.data.base import Data, Dataset, Kind, check_fraction, stratified
from fedq.errors import ConfigError, FedqError
from fedq.registry import register


@register("data", "huggingface")
class HuggingFace(Data):
    """Load a data set of the hub by name (Flower Datasets); scripts of the hub never run.

    Image columns become (H, W) or (H, W, 3) uint8; columns of numbers become features (F,) or
    series (T, C). Files are kept in the hub's cache, so that a second run works offline.

    Args:
      dataset: Name on the hub, as in ``ylecun/mnist``; on the command line also ``data.name``.
      subset: Configuration of the data set, if it has several.
      input_column: Column of the inputs.
      label_column: Column of the labels.
      client_column: Column of client ids for the natural partition, as in ``writer_id``; empty for
        none.
      train_split: Split to train on.
      test_split: Split to test on; empty holds out ``test_fraction`` of every training class.
      size: Images are resized to this many pixels on both sides; 0 keeps a size that all share.
      test_fraction: Held out where there is no test split.
      seed: Chooses the examples held out; the run's seed does not.

    Example:
      >>> HuggingFace(dataset="flwrlabs/femnist", label_column="character", test_split="").dataset
      'flwrlabs/femnist'
    """

    dataset: str
    subset: str = ""
    input_column: str = "image"
    label_column: str = "label"
    client_column: str = ""
    train_split: str = "train"
    test_split: str = "test"
    size: int = 0
    test_fraction: float = 0.2
    seed: int = 0

    #: The field that ``data.name`` on the command line means.
    name_option: ClassVar[str] = "dataset"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ConfigError("data.name must be a data set of the hub, as in ylecun/mnist")
        if self.size < 0:
            raise ConfigError("data.size must be positive, or 0 to keep the images' size")
        check_fraction(self.test_fraction, "data.test_fraction")

    def load(self) -> Dataset:
        """Download (once) and decode the splits.

        Raises:
          ConfigError: If Flower Datasets is not installed, or columns do not fit.
          FedqError: If the hub or the data set cannot be reached.
        """
        train = self._split(self.train_split)
        x, kind = self._inputs(train)
        y = self._column(train, self.label_column)
        clients = self._column(train, self.client_column) if self.client_column else None
        if self.test_split:
            test = self._split(self.test_split)
            x_test, y_test = self._inputs(test)[0], self._column(test, self.label_column)
        else:
            rows, held = stratified(y, self.test_fraction, self.seed)
            x_test, y_test = x[held], y[held]
            x, y = x[rows], y[rows]
            clients = clients if clients is None else clients[rows]
        try:
            return Dataset.of(x, y, x_test, y_test, kind=kind, client_train=clients)
        except ConfigError as error:
            raise ConfigError(f"{self.dataset}: {error}") from None

    def _split(self, split: str) -> Any:
        if find_spec("flwr_datasets") is None:
            raise ConfigError("data=huggingface needs flwr-datasets: pip install -e '.[data-hub]'")
        from flwr_datasets import FederatedDataset

        try:
            source = FederatedDataset(
                dataset=self.dataset, subset=self.subset or None, partitioners={}, shuffle=False
            )
            return source.load_split(split)
        except Exception as error:  # the hub's client raises dozens of types
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FedqError(
                f"cannot load split '{split}' of {self.dataset}: {reason}; check the name and the "
                "network, or save the data as a file for data=npz"
            ) from error

    def _column(self, split: Any, column: str) -> NDArray[Any]:
        if column not in split.column_names:
            raise ConfigError(
                f"{self.dataset} has no column '{column}'; it has {', '.join(split.column_names)}"
            )
        try:
            return np.asarray(list(split[column]))
        except ValueError:
            raise ConfigError(
                f"{self.dataset}: column '{column}' holds values of several shapes"
            ) from None

    def _inputs(self, split: Any) -> tuple[NDArray[Any], Kind]:
        column = self.input_column
        if column in split.column_names:
            values = list(split[column])
            if values and hasattr(values[0], "convert"):
                return stack_images(values, self.size, self.dataset), "image"
        x = self._column(split, column)
        if x.dtype.kind not in "buif" or x.ndim not in (2, 3):
            raise ConfigError(
                f"{self.dataset}: column '{column}' holds neither images nor numbers of shape (F,) "
                "or (T, C); choose another with data.input_column"
            )
        return x, "features" if x.ndim == 2 else "series"
