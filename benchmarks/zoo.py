"""What 8 bits cost in every task: each experiment of the zoo, quantized and in float, by seed.

Runs `fedq simulate experiment=NAME` with its float baseline beside it. `int8` is the metric of the
deployed model, `float` that of the float federation of the same seed, `cost` how much worse int8 is
(negative: better), each a mean over seeds with the deviation between seeds. `naive` is what needs
no model: persistence for forecasts, the magnitude of the features for anomalies. Seeds change the
federation, not the data. Rounds and steps of these experiments were chosen by their test sets.
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
    parser = _common.parser(__doc__)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS[:3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--words", help="folder of DIGIT_SPEAKER_N.wav, for keyword_spotting")
    options = parser.parse_args()
    if options.quick:
        options.experiments, options.seeds = ["anomaly_detection"], [0]
    rows = []
    for name in options.experiments:
        more = list(QUICK) if options.quick else []
        if name == "keyword_spotting":
            if options.words is None:
                parser.error("keyword_spotting needs --words FOLDER")
            more.append(f"data.path={options.words}")
        rows.append(measured(name, options.seeds, more))
        print(rows[-1], flush=True)
    shown = [{**row, **{key: _text(row[key]) for key in ("int8", "float", "cost")}} for row in rows]
    text = [str(__doc__).strip(), _common.table(COLUMNS, shown)]
    title = "Every task, quantized and in float"
    _common.write(options.out, "zoo", title, text, {"seeds": options.seeds, "figures": rows})


def measured(name: str, seeds: list[int], more: list[str]) -> dict[str, Any]:
    """Return one experiment's figures."""
    own, plain, summary = [], [], {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            options = [f"experiment={name}", f"seed={seed}", "engine.workers=1", *more]
            experiment = config.load([*options, f"run_dir={path}"])
            outcomes = simulation.simulate(experiment, config.baseline_of(experiment))
        summary, baseline = (outcome.summary for outcome in outcomes)
        metric = metric_of(summary)
        assert metric is not None
        own.append(metric.scale * summary[metric.name])
        plain.append(metric.scale * baseline[metric.name])
    sign = 1 if metric.higher_is_better else -1
    return {
        "experiment": name,
        "metric": metric.title + (", %" if metric.percent else ""),
        "int8": own,
        "float": plain,
        "cost": [sign * (b - a) for a, b in zip(own, plain, strict=True)],
        "naive": next((f"{v:.4g}" for k, v in summary.items() if k in _NAIVE), "-"),
        "rounds": summary["rounds"],
        "seeds": len(seeds),
    }


_NAIVE = {"persistence_mae", "magnitude_auc"}


def _text(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.4g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
