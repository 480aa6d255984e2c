"""Apple's pfl: its simulated backend in one process.

Data are tensors in memory before the start. pfl does not shuffle a user's examples, which is less
work than the others do; they are shuffled here, once, as they come sorted by class.
"""

from __future__ import annotations

import numpy as np
import torch
from _protocol import Driver
from _training import BATCH_SIZE, LEARNING_RATE, examples, flat, load_flat, network
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional


class Network(nn.Module):
    """The network with pfl's two methods."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        self.inner.train()
        return functional.cross_entropy(self.inner(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """Return what pfl evaluates; not called here."""
        return {"loss": Weighted(float(self.loss(x, y)) * len(x), len(x))}


def main() -> None:
    torch.set_num_threads(1)
    driver = Driver()
    work = driver.work
    xs, ys = examples(driver.arrays)
    rng = np.random.default_rng(work["seed"])
    users = []
    for x, y in zip(xs, ys, strict=True):
        order = torch.from_numpy(rng.permutation(len(y)))
        users.append(Dataset(raw_data=[x[order], y[order]]))
    inner = network(work["model"])
    load_flat(inner, driver.arrays["weights"])
    net = Network(inner)
    model = PyTorchModel(net, torch.optim.SGD, torch.optim.SGD(net.parameters(), lr=1.0))
    data = FederatedDataset(users.__getitem__, lambda: int(rng.integers(len(users))))
    backend = SimulatedBackend(training_data=data, val_data=data)
    training = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH_SIZE
    )

    def run(rounds: int) -> None:
        params = NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**9,
            train_cohort_size=work["cohort"],
            val_cohort_size=0,
        )
        FederatedAveraging().run(params, backend, model, training, callbacks=[])
        driver.save(lambda: flat(inner.state_dict()))

    driver.serve(run)


main()
