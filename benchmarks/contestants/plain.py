"""The floor: federated averaging as one loop in one process, written by hand."""

from __future__ import annotations

import numpy as np
import torch
from _protocol import Driver
from _training import examples, flat, load_flat, network, train


def main() -> None:
    torch.set_num_threads(1)
    driver = Driver()
    work, arrays = driver.work, driver.arrays
    xs, ys = examples(arrays)
    net = network(work["model"])
    load_flat(net, arrays["weights"])
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    rng = np.random.default_rng(work["seed"])
    script = [(cohort, iter(orders)) for cohort, orders in work.get("script", [])]

    def run(rounds: int) -> None:
        for _ in range(rounds):
            if script:
                cohort, orders = script.pop(0)
            else:
                cohort, orders = rng.choice(len(xs), work["cohort"], replace=False), None
            mean = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
            total = sum(len(ys[client]) for client in cohort)
            for client in cohort:
                net.load_state_dict(weights)
                n = len(ys[client])
                order = torch.from_numpy(rng.permutation(n)) if orders is None else next(orders)
                train(net, xs[client], ys[client], order)
                for name, tensor in net.state_dict().items():
                    mean[name].add_(tensor, alpha=n / total)
            weights.update(mean)
        driver.save(lambda: flat(weights))

    driver.serve(run)


main()
