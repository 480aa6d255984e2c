"""What quantized updates leak: reconstruction against bits, membership of float, 8 and 4 bits.

Reconstruction is of single MNIST digits from the first model: the closed form of a dense first
layer, and a search on the default convolutional network, each naive and codec-aware. Membership is
of a recipe that overfits (handwritten digits, every fifth label drawn at random), with the same
shadow seeds for every codec. Takes some minutes of one core; `--quick` is a check that it runs.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import parser, table, write

from fedq import config, registry
from fedq.data.base import load
from fedq.robustness.base import Work
from fedq.robustness.membership import Membership
from fedq.robustness.outcome import Outcome
from fedq.robustness.reconstruction import Reconstruction
from fedq.robustness.subject import Subject
from fedq.simulation import run_experiment

COMMON = ("engine.workers=1", "baseline=false")
OVERFITTING = (
    "model=mlp",
    "model.hidden=[128]",
    "clients=4",
    "clients_per_round=4",
    "partition=iid",
    "batch_size=32",
    "local_epochs=10",
    "learning_rate=0.2",
    *COMMON,
)
CODECS: dict[str, dict[str, Any]] = {
    "float": {"name": "identity"},
    "8 bits": {"name": "uniform", "bits": 8, "rounding": "stochastic"},
    "4 bits": {"name": "uniform", "bits": 4, "rounding": "stochastic"},
    "2 bits": {"name": "uniform", "bits": 2, "rounding": "stochastic"},
    "1 bit": {"name": "sign"},
}


def subject_of(path: Path, overrides: tuple[str, ...], codec: str) -> Subject:
    """Run a federation with a codec and load it."""
    experiment = config.load(overrides)
    chosen = registry.from_config("codec", CODECS[codec])
    run_experiment(experiment.replace(codec=chosen), path)
    return Subject.load(path)


def noisy_digits(path: Path, seed: int) -> Path:
    """Write the digits with every fifth label drawn at random: what a model can only memorise."""
    data, rng = load(registry.build("data", "digits")), np.random.default_rng(seed)

    def labels(y: Any) -> Any:
        wrong = rng.random(len(y)) < 0.2
        return np.where(wrong, rng.integers(data.classes, size=len(y)), y)

    np.savez(
        path,
        x_train=data.x_train,
        y_train=labels(data.y_train),
        x_test=data.x_test,
        y_test=labels(data.y_test),
    )
    return path


def named(outcomes: Any) -> dict[str, Outcome]:
    """Return outcomes by name."""
    return {outcome.name: outcome for outcome in outcomes}


def reconstruction(folder: Path, seed: int, quick: bool) -> tuple[list[dict[str, Any]], Any]:
    """Invert single updates by codec; return rows, and the closed form's curve over bits."""
    rows, curve = [], None
    for codec in ("float", "2 bits") if quick else CODECS:
        place = folder / f"images {codec}"
        subject = subject_of(place, ("rounds=1", "clients=20", *COMMON), codec)
        options = Reconstruction(
            inputs=4 if quick else 16,
            searched=1 if quick else 2,
            iterations=50 if quick else 600,
            restarts=1,
            crowd=10,
        )
        start = time.process_time()
        found = named(options.run(subject, Work(seed, folder)))
        closed = found["one example, dense layer"]
        search = found["one example, searched"]
        if curve is None:
            curve = closed.details["by bits of a uniform code"]
        rows.append(
            {
                "codec": codec,
                "least_squares": closed.details["by attack"]["least squares"],
                "rank_one": closed.details["by attack"]["rank one"],
                "cells": closed.details["by attack"]["cells"],
                "ssim": closed.details["SSIM"],
                "searched_naive": search.details["by attack"]["cosine"],
                "searched_cells": search.details["by attack"]["cells"],
                "labels": found["label of one example"].value,
                "masked": found["sum of 10 clients, masked"].value,
                "noisy": found["sum of 10 clients, clipped, noisy and masked"].value,
                "cpu_s": time.process_time() - start,
            }
        )
    return rows, curve


def membership(folder: Path, seed: int, quick: bool) -> list[dict[str, Any]]:
    """Attack the overfitting recipe by codec."""
    data = noisy_digits(folder / "digits.npz", seed)
    rows = []
    for codec in ("4 bits",) if quick else ("float", "8 bits", "4 bits"):
        overrides = ("data=npz", f"data.path={data}", f"rounds={1 if quick else 8}", *OVERFITTING)
        subject = subject_of(folder / f"members {codec}", overrides, codec)
        options = Membership(shadows=4 if quick else 12, checkpoints=0, observed=0)
        found = named(options.run(subject, Work(seed, folder / f"shadows {codec}", 1)))
        area = found["recipe, AUC"]
        row: dict[str, Any] = {"codec": codec, "auc": area.value, "status": area.status}
        for name, value in area.details["deployed"].items():
            row[f"auc {name}"] = value
        for rate in ("1", "0.1"):
            detection = found[f"recipe, TPR at {rate} % FPR"]
            row[f"tpr {rate}"] = detection.value
            row[f"interval {rate}"] = _interval(detection)
            row[f"by attack {rate}"] = detection.details.get("deployed")
        row["budget"] = dict(area.budget)
        rows.append(row)
    return rows


def _interval(outcome: Outcome) -> str:
    if outcome.interval is None:
        return outcome.status
    return "{:.3f} to {:.3f}".format(*outcome.interval)


def main() -> None:
    """Measure and write."""
    options = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        members = membership(folder, options.seed, options.quick)
        images, curve = reconstruction(folder, options.seed, options.quick)
    write(
        options.out,
        "leakage",
        "What quantized updates leak",
        [
            "Reconstruction of one MNIST digit, mean PSNR in dB: closed form of a dense first layer"
            " (least squares takes the decoded update at face value, cells know the codec), search"
            " on the default network; labels inferred; digits recovered to 20 dB from a masked sum"
            " of ten clients, without and with clipping and noise of multiplier 1.",
            table(
                {
                    "codec": "uplink",
                    "least_squares": "least squares",
                    "rank_one": "rank one",
                    "cells": "cells",
                    "ssim": "SSIM of the best",
                    "searched_naive": "search, naive",
                    "searched_cells": "search, cells",
                    "labels": "labels",
                    "masked": "masked sum",
                    "noisy": "masked, noisy sum",
                },
                images,
            ),
            "Closed form by bits of a uniform code with a step per tensor:",
            table(
                {
                    "bits": "bits",
                    "bits per parameter": "sent",
                    "least squares": "least squares",
                    "rank one": "rank one",
                    "cells": "cells",
                },
                curve,
            ),
            "Membership inference on a recipe that overfits, every shadow a target in turn: the"
            " strongest attack, with intervals that hold for all attacks together.",
            table(
                {
                    "codec": "uplink",
                    "auc": "AUC",
                    "tpr 1": "TPR at 1 % FPR",
                    "interval 1": "interval",
                    "tpr 0.1": "TPR at 0.1 % FPR",
                    "interval 0.1": "interval ",
                    "auc loss threshold": "AUC, loss",
                    "auc LiRA online": "AUC, LiRA",
                    "auc RMIA": "AUC, RMIA",
                },
                members,
            ),
        ],
        {"seed": options.seed, "images": images, "curve": curve, "membership": members},
    )


if __name__ == "__main__":
    main()
