"""fedq's strategy over its local engine."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from _protocol import Driver

from fedq import build, config, registry, simulation
from fedq.client import client_app
from fedq.data.base import load
from fedq.data.partitions.base import Parts
from fedq.downlink import models_kept
from fedq.engines.local import LocalGrid
from fedq.experiment import Experiment
from fedq.strategy import FedQ
from fedq.training import TrainingConfig, trainer_for


def strategy(experiment: Experiment) -> tuple[FedQ, np.ndarray, np.ndarray]:
    """Return the strategy of an experiment, and the initial weights and state."""
    dataset = load(experiment.data)
    spec = {
        "model": registry.to_config(experiment.model),
        "quantization": registry.to_config(experiment.quantization),
        "input_shape": list(dataset.input_shape),
        "classes": dataset.classes,
    }
    trainer = trainer_for(**spec, seed=experiment.seed)
    training = {name: getattr(experiment, name) for name in TrainingConfig().to_config()}
    fedq = FedQ(
        layout=trainer.layout,
        state_layout=trainer.state_layout,
        codec=experiment.codec,
        downlink=experiment.downlink,
        aggregator=experiment.aggregator,
        server_optimizer=experiment.server_optimizer,
        clients_per_round=experiment.clients_per_round,
        seed=experiment.seed,
        task={**spec, "training": training},
        history=experiment.downlink_history,
        uplink_context=experiment.uplink_context,
    )
    return fedq, trainer.weights(), trainer.state()


def partition(experiment: Experiment, clients: int | None) -> Parts:
    """Return the experiment's partition, or 40 rows for each of any number of clients."""
    dataset = load(experiment.data)
    if clients is None:
        return simulation.partition(experiment, dataset)
    drawn: Parts = build("partition", "draws", rows=40).split(
        dataset.strata, clients, experiment.seed
    )
    return drawn


def main() -> None:
    driver = Driver()
    experiment = config.load(driver.work["options"])
    parts = partition(experiment, driver.work.get("federation"))
    fedq, weights, state = strategy(experiment)
    current = fedq.initial(weights, state)
    with tempfile.TemporaryDirectory() as folder:
        site = partial(
            simulation.make_site,
            registry.to_config(experiment.data),
            (),
            parts,
            Path(folder),
            models_kept(experiment.downlink_history),
        )
        workers = driver.work["workers"]
        with LocalGrid(partial(client_app, site), len(parts), workers=workers) as grid:

            def run(rounds: int) -> None:
                nonlocal current
                for _ in range(rounds):
                    current, report = fedq.run_round(grid, current)
                    if report.rejected:
                        raise RuntimeError(str(report.reasons))
                driver.save(lambda: current.weights)

            driver.serve(run)


main()
