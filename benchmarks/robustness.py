"""Robust accuracy beside public libraries, and naive against true robustness of quantized models.

    python benchmarks/robustness.py          # foolbox, adversarial-robustness-toolbox and
                                             # pyautoattack where they can be imported
                                             # (pip install --no-deps them: their pins are old)

First, the float twin of a W8A8 run of fedq, the same examples, eps (L-inf 0.1) and budget for all:
robust accuracy, and CPU seconds of one thread, the least of --repeats rounds over all in turn.
Then runs of fedq at W8A8, W4A4 and W2A4: what an attack finds that differentiates the integer model
itself, whose gradient is zero, against the worst case of all attacks on the deployed model.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _common
import torch
from torch import Tensor

from fedq import build, cli
from fedq.evasion.base import Ball, Target
from fedq.robustness.base import Work
from fedq.robustness.evasion import EvasionEvaluation
from fedq.robustness.subject import Subject

EPS = 0.1
QUANTIZATIONS = {
    "W8A8": ["quantization=int8"],
    "W4A4": ["quantization=w4a4"],
    "W2A4": [
        *("quantization=w2a8", "quantization.activations=range", "quantization.activations.bits=4"),
    ],
}
Attack = Callable[[Tensor, Tensor], Tensor]


def trained(folder: Path, options: list[str], quick: bool, seed: int) -> Subject:
    """Return a run of fedq, made anew."""
    size = ["data=digits", "model=mlp", "rounds=3", "clients=5"] if quick else ["rounds=20"]
    run = [*size, *options, f"seed={seed}", "baseline=false", "engine.workers=1"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["simulate", *run, f"run_dir={folder}"]) == 0
    torch.set_num_threads(1)
    return Subject.load(folder)


def contestants(subject: Subject, steps: int, queries: int) -> dict[str, dict[str, Attack]]:
    """Return who attacks the float twin, by attack and library."""
    network, seed = subject.twin_network, 0
    target, ball = Target(network), Ball("linf", EPS, 0.0, 1.0)

    def own(name: str, **options: Any) -> Attack:
        attack = build("evasion", name, **options)
        return lambda x, y: attack(target, x, y, ball, seed)

    found = {
        "FGSM": {"fedq": own("fgsm")},
        f"PGD-{steps}": {"fedq": own("pgd", steps=steps)},
        f"APGD-CE-{steps}": {"fedq": own("apgd", steps=steps)},
        f"APGD-T-{steps}, 3 classes": {"fedq": own("apgd_targeted", steps=steps, classes=3)},
        f"Square-{queries}": {"fedq": own("square", queries=queries)},
    }
    fgsm, pgd, apgd, targeted, square = found.values()
    if find_spec("foolbox"):
        import foolbox

        model = foolbox.PyTorchModel(network, bounds=(0, 1))
        for into, attack in (
            (fgsm, foolbox.attacks.LinfFastGradientAttack()),
            (pgd, foolbox.attacks.LinfPGD(steps=steps, abs_stepsize=2.5 * EPS / steps)),
        ):
            into["foolbox"] = lambda x, y, a=attack: a(model, x, y, epsilons=EPS)[1]
    if find_spec("art"):
        from art.attacks import evasion
        from art.estimators.classification import PyTorchClassifier

        classifier = PyTorchClassifier(
            network,
            torch.nn.CrossEntropyLoss(),
            subject.dataset.input_shape,
            subject.dataset.classes,
            clip_values=(0.0, 1.0),
        )
        step = 2.5 * EPS / steps
        for into, attack in (
            (fgsm, evasion.FastGradientMethod(classifier, eps=EPS, batch_size=1000)),
            (
                pgd,
                evasion.ProjectedGradientDescentPyTorch(
                    classifier, eps=EPS, eps_step=step, max_iter=steps, num_random_init=1,
                    batch_size=1000, verbose=False,
                ),
            ),
            (
                square,
                evasion.SquareAttack(
                    classifier, eps=EPS, max_iter=queries, p_init=0.8, batch_size=1000,
                    verbose=False,
                ),
            ),
        ):  # fmt: skip
            into["ART"] = lambda x, y, a=attack: torch.from_numpy(
                a.generate(x.numpy(), torch.nn.functional.one_hot(y, 10).numpy())
            )
    if find_spec("pyautoattack"):
        from pyautoattack import AutoAttack

        for into, name in ((apgd, "apgd-ce"), (targeted, "apgd-t"), (square, "square")):
            suite = AutoAttack(
                network, norm="Linf", eps=EPS, seed=seed, version="custom", attacks=[name]
            )
            suite.apgd.n_restarts, suite.apgd.n_iter = 1, steps
            suite.apgd_targeted.n_target_classes, suite.apgd_targeted.n_iter = 3, steps
            suite.square.n_queries = queries
            into["pyautoattack"] = lambda x, y, s=suite: s.run_standard_evaluation(
                x, y, batch_size=1000
            )[0]
    return found


def compare(
    subject: Subject, examples: int, steps: int, queries: int, repeats: int
) -> list[dict[str, Any]]:
    """Return robust accuracy and CPU seconds of each library's attacks on the float twin."""
    x, y = map(torch.from_numpy, subject.sample(2 * examples, 0))
    right = (subject.twin_network(x).argmax(1) == y).nonzero().squeeze(1)[:examples]
    x, y = x[right], y[right]
    rows = []
    for attack, libraries in contestants(subject, steps, queries).items():
        best = dict.fromkeys(libraries, float("inf"))
        accuracy = {}
        for _ in range(repeats):
            for library, run in libraries.items():
                start = time.process_time()
                moved = run(x, y)
                best[library] = min(best[library], time.process_time() - start)
                assert (moved - x).abs().max() <= EPS + 1e-5
                held = subject.twin_network(moved).argmax(1) == y
                accuracy[library] = float(held.float().mean())
        print(attack, best, accuracy, file=sys.stderr, flush=True)
        rows += [
            {
                "attack": attack,
                "library": library,
                "accuracy": 100 * accuracy[library],
                "points": 100 * (accuracy[library] - accuracy["fedq"]),
                "cpu_s": best[library],
                "ratio": best[library] / best["fedq"],
            }
            for library in libraries
        ]
    return rows


def masking(name: str, subject: Subject, examples: int, steps: int, queries: int) -> dict[str, Any]:
    """Return naive and true robustness of a quantized run."""
    apgd = build("evasion", "apgd", steps=steps)
    attacks = (
        apgd,
        build("evasion", "apgd", steps=steps, backward="bpda"),
        build("evasion", "pgd", steps=steps, loss="dlr"),
        build("evasion", "transfer", inner=apgd),
        build("evasion", "square", queries=queries),
    )
    evaluation = EvasionEvaluation(test_examples=examples, eps=EPS, curve=(), attacks=attacks)
    (outcome,) = evaluation.run(subject, Work(0, subject.path))
    assert outcome.plot is not None
    naive = next(c for c in outcome.plot.curves if "naive" in c.label)
    rows = outcome.details["attacks in order"]
    return {
        "model": name,
        "clean": naive.y[0],
        "naive": naive.y[-1],
        "apgd": rows[0]["accuracy after, %"],
        "worst": 100 * (outcome.value or 0.0),
        "twin": 100 * (outcome.twin or 0.0),
        "status": outcome.status + (f": {outcome.reason}" if outcome.reason else ""),
    }


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=2, help="of each attack (default: 2)")
    options = parser.parse_args()
    quick = options.quick
    examples, steps, queries = (20, 5, 20) if quick else (200, 40, 500)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: trained(Path(folder) / name, of, quick, options.seed)
            for name, of in QUANTIZATIONS.items()
        }
        peers = compare(runs["W8A8"], examples, steps, queries, options.repeats)
        masked = [masking(name, run, examples, steps, queries) for name, run in runs.items()]
    text = [
        f"{examples} random test examples that the float twin gets right, L-inf {EPS}, one thread. "
        "Points and "
        "ratio are those of a library over fedq's; a ratio above 1 says that fedq took less CPU.",
        _common.table(
            {
                "attack": "attack",
                "library": "library",
                "accuracy": "robust accuracy, %",
                "points": "points from fedq",
                "cpu_s": "CPU s",
                "ratio": "CPU, fedq = 1",
            },
            peers,
        ),
        f"Runs of fedq, {examples} test examples, accuracies in %, judged by the deployed integer "
        "model. Naive: an attack that differentiates that model, whose gradient is zero. Worst "
        "case: APGD through straight-through gradients and through the twin (BPDA), PGD on DLR, "
        "transfer from the twin, and Square.",
        _common.table(
            {
                "model": "model",
                "clean": "clean",
                "naive": "naive attack",
                "apgd": "APGD alone",
                "worst": "worst case",
                "twin": "worst case of the float twin",
                "status": "gates",
            },
            masked,
        ),
    ]
    figures = {
        "seed": options.seed,
        "eps": EPS,
        "repeats": options.repeats,
        "peers": peers,
        "masking": masked,
    }
    _common.write(
        options.out, "robustness", "Robustness: peers, and what naive attacks miss", text, figures
    )


if __name__ == "__main__":
    main()
