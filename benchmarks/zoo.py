"""What 8 bits cost in every task: each experiment of the zoo, quantized and in float, by seed.

Runs `fedq simulate experiment=NAME` with its float baseline beside it. `int8` is the metric of the
deployed model, `float` that of the float federation of the same seed, `cost` how much worse int8 is
(negative: better), each a mean over seeds with the deviation between seeds. `naive` is what needs
no model: persistence for forecasts, the magnitude of the features for anomalies. Seeds change the
federation, not the data. Rounds and steps of these experiments were chosen by their test sets.

The results file has a record per experiment and seed, with its date and processor; a rerun keeps
those of the same settings (`--again` does not).
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import _common

from fedq import config, simulation
from fedq.metrics import metric_of

EXPERIMENTS = ("anomaly_detection", "visual_wake_words", "forecasting", "keyword_spotting")
QUICK = ("rounds=1", "local_epochs=1")
COLUMNS = {
    "experiment": "experiment",
    "metric": "metric",
    "int8": "int8",
    "float": "float",
    "cost": "cost of int8",
    "naive": "naive",
    "rounds": "rounds",
    "seeds": "seeds",
}


def main() -> None:
    """Run all cells and write the results."""
    parser = _common.parser(__doc__)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS[:3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--words", help="folder of DIGIT_SPEAKER_N.wav, for keyword_spotting")
    parser.add_argument("--again", action="store_true", help="drop what the results file holds")
    options = parser.parse_args()
    if options.quick:
        options.experiments, options.seeds = ["anomaly_detection"], [0]
    more = QUICK if options.quick else ()
    settings = {name: " ".join((f"experiment={name}", *more)) for name in EXPERIMENTS}
    cells = (
        [] if options.again else _common.earlier_cells(options.out, "zoo", settings, "experiment")
    )
    done = {(cell["experiment"], cell["seed"]) for cell in cells}
    for seed in options.seeds:
        for name in options.experiments:
            if (name, seed) in done:
                continue
            words: tuple[str, ...] = ()
            if name == "keyword_spotting":
                if options.words is None:
                    parser.error("keyword_spotting needs --words FOLDER")
                words = (f"data.path={options.words}",)
            cell = {"experiment": name, "seed": seed, "settings": settings[name]}
            figures = measured([*settings[name].split(), *words], seed)
            cells.append({**cell, **figures, **_common.when_and_where()})
            print(cells[-1], flush=True)
            report(options.out, cells)


def measured(overrides: list[str], seed: int) -> dict[str, Any]:
    """Return what an experiment of one seed gives, in int8 and in float."""
    with tempfile.TemporaryDirectory() as folder:
        options = [*overrides, f"seed={seed}", "engine.workers=1", "evaluate_every=1000"]
        experiment = config.load([*options, f"run_dir={Path(folder) / 'run'}"])
        outcomes = simulation.simulate(experiment, config.baseline_of(experiment))
    summary, baseline = (outcome.summary for outcome in outcomes)
    metric = metric_of(summary)
    assert metric is not None
    return {
        "metric": metric.title + (", %" if metric.percent else ""),
        "higher_is_better": metric.higher_is_better,
        "int8": metric.scale * summary[metric.name],
        "float": metric.scale * baseline[metric.name],
        "naive": next((v for k, v in summary.items() if k in _NAIVE), None),
        "rounds": summary["rounds"],
    }


def rows_of(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per experiment."""
    rows = []
    for name in EXPERIMENTS:
        own = [cell for cell in cells if cell["experiment"] == name]
        if not own:
            continue
        sign = 1 if own[0]["higher_is_better"] else -1
        values = {key: [cell[key] for cell in own] for key in ("int8", "float")}
        values["cost"] = [sign * (cell["float"] - cell["int8"]) for cell in own]
        naive = own[0]["naive"]
        rows.append(
            {
                "experiment": name,
                "metric": own[0]["metric"],
                **{key: _text(value) for key, value in values.items()},
                "naive": "-" if naive is None else f"{naive:.4g}",
                "rounds": own[0]["rounds"],
                "seeds": len(own),
            }
        )
    return rows


def report(out: Path, cells: list[dict[str, Any]]) -> None:
    """Write the results so far."""
    text = [str(__doc__).strip(), _common.table(COLUMNS, rows_of(cells))]
    _common.write(out, "zoo", "Every task, quantized and in float", text, {"cells": cells})


_NAIVE = {"persistence_mae", "magnitude_auc"}


def _text(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.4g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
