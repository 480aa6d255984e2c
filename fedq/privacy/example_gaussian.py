"""Example-level privacy on each client by DP-SGD, Abadi et al. 2016, arXiv:1607.00133."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedq.errors import ConfigError
from fedq.privacy._entropy import Entropy
from fedq.privacy._ledger import ORDERS, Ledger, Rdp, dp_accounting, sampled_gaussian_epsilon
from fedq.privacy.base import Contribution, Mechanism, PrivacyState, Round
from fedq.registry import register
from fedq.training_config import TrainingConfig

if TYPE_CHECKING:
    from fedq.experiment import Experiment


@register("privacy", "example_gaussian")
class ExampleGaussian(Mechanism):
    """Each client trains with DP-SGD: what leaves it hides any one of its examples.

    A step takes each of the n local examples with probability ``q = batch_size / n``, clips their
    gradients to norm C, and moves by

        -learning_rate (sum_i min(1, C / |g_i|) g_i + N(0, (z C)^2 I)) / batch_size.

    A round has ``local_epochs n / batch_size`` steps, rounded. Examples are chosen by the device's
    own secret, so amplification by Poisson sampling holds. What is sent follows from what was
    trained, so codec, server and other clients may do with it as they like.

    Clients have different n, and with it different epsilons; the summary has each one's, and states
    the largest.

    Example:
      >>> from fedq.registry import build
      >>> privacy = build("privacy", "example_gaussian", noise_multiplier=1.0)
      >>> about = Round(1, 0, 10, 1000, batch_size=10, epochs=2)
      >>> privacy.sampling(100, about)
      (0.1, 20)

    Reference:
      Abadi et al. 2016, "Deep learning with differential privacy", algorithm 1; Mironov, Talwar and
      Zhang 2019, "Renyi differential privacy of the sampled Gaussian mechanism".
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"noise_multiplier": 1.0},)
    unit: ClassVar[str | None] = "example"
    relation: ClassVar[str] = "add or remove one training example of one client"
    against: ClassVar[str] = (
        "everybody but the client itself; the server, too, as long as it asks for the stated noise"
    )
    accountant: ClassVar[str] = (
        "PLD of the Poisson-sampled Gaussian; RDP for a client whose number of examples changed"
    )
    assumptions: ClassVar[tuple[str, ...]] = (
        "a client's number of examples is public, and is what it says",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_multiplier is None:
            raise ConfigError(
                "privacy=example_gaussian needs privacy.noise_multiplier (such as 1): what noise a "
                "budget allows differs by client; privacy.epsilon then stops the run in time"
            )

    def check(self, experiment: Experiment) -> None:
        """Refuse what learns from examples outside of the noisy steps."""
        if experiment.quantization.name != "none":
            raise ConfigError(
                "privacy=example_gaussian clips the gradient of each example, and quantization="
                f"{experiment.quantization.name} learns ranges beside it without noise; choose "
                "quantization=none, and quantize the trained model"
            )
        if experiment.adversarial_eps:
            raise ConfigError(
                "privacy=example_gaussian has a training loop of its own, without an attacker; "
                "choose adversarial_eps=0"
            )

    def about(
        self, number: int, seed: int, cohort: int, size: int, task: Mapping[str, Any]
    ) -> Round:
        """Return what both ends know of a round, with how clients train."""
        training = TrainingConfig.from_config(task.get("training", {}))
        return Round(number, seed, cohort, size, training.batch_size, training.local_epochs)

    def sampling(self, examples: int, about: Round) -> tuple[float, int]:
        """Return the probability of an example in a step, and the steps of a round."""
        share = min(1.0, about.batch_size / examples)
        return share, max(1, round(about.epochs / share))

    def round_rdp(self, examples: int, about: Round) -> Rdp:
        """Return what a round costs an example of a client with so many, (orders,)."""
        return sampled_gaussian_rdp(self.sigma, *self.sampling(examples, about))

    def refusal(self, examples: int, about: Round) -> str | None:
        """Return why a client takes no part: a round alone would exceed the budget."""
        if self.epsilon is None:
            return None
        cost = self._epsilon(self.round_rdp(examples, about), *self.sampling(examples, about))
        if cost <= self.epsilon:
            return None
        return (
            f"{examples} examples cost an epsilon of {cost:.3g} in one round; the budget is "
            f"{self.epsilon}"
        )

    def after(
        self,
        state: PrivacyState | None,
        accepted: Sequence[Contribution],
        about: Round,
        entropy: Entropy,
    ) -> PrivacyState:
        """Return the state with a round in its ledger."""
        assert state is not None
        costs = np.stack([self.round_rdp(one.examples, about) for one in accepted])
        sampling = [self.sampling(one.examples, about) for one in accepted]
        ledger = state.ledger.charged([one.client for one in accepted], costs, sampling)
        return dataclasses.replace(state, ledger=ledger)

    def exhausted(
        self, state: PrivacyState | None, clients: Sequence[int | None], needed: int, about: Round
    ) -> bool:
        """Whether one more round like its others would exceed the budget of a client.

        One without others refuses by itself; see :meth:`refusal`.
        """
        assert state is not None
        if self.epsilon is None:
            return False
        ledger = state.ledger
        seen = [row for row in ledger.rows(clients) if row is not None]
        ahead = 1 + 1 / ledger.releases[seen]
        steps = np.ceil(ledger.steps[seen] * ahead).astype(np.int64)
        rdp = ledger.rdp[seen] * ahead[:, None]
        return self._worst(rdp, ledger.share[seen], steps) > self.epsilon

    def spent(self, ledger: Ledger) -> float:
        """Return the largest epsilon of a client."""
        return self._worst(ledger.rdp, ledger.share, ledger.steps)

    def _epsilon(self, rdp: Rdp, share: float, steps: int) -> float:
        """Return one client's epsilon: the better of both accounts."""
        by_rdp = self.epsilon_of(rdp)
        if not steps or math.isnan(share):
            return by_rdp
        return min(by_rdp, sampled_gaussian_epsilon(self.sigma, share, int(steps), self.delta))

    def _worst(self, rdp: Rdp, share: NDArray[np.float64], steps: NDArray[np.int64]) -> float:
        """Return the largest of several clients' epsilons; few distributions are computed."""
        bounds = np.array([self.epsilon_of(row) for row in rdp])
        worst = 0.0
        for i in np.argsort(-bounds, kind="stable"):
            if bounds[i] <= worst:
                break
            worst = max(worst, self._epsilon(rdp[i], float(share[i]), int(steps[i])))
        return worst

    def statement(
        self, state: PrivacyState | None, clients: int, *, masked: bool = False
    ) -> dict[str, Any]:
        """Return the guarantee, and each client's own epsilon."""
        assert state is not None
        ledger = state.ledger
        columns = zip(ledger.clients, ledger.rdp, ledger.share, ledger.steps, strict=True)
        own = {str(n): self._epsilon(rdp, float(q), int(steps)) for n, rdp, q, steps in columns}
        return {**super().statement(state, clients, masked=masked), "epsilon_by_client": own}


@lru_cache(maxsize=4096)
def sampled_gaussian_rdp(noise_multiplier: float, share: float, steps: int) -> Rdp:
    """Return the RDP of so many Poisson-sampled Gaussian steps, (orders,).

    A fractional order has that of the next: the series for those does not always converge.
    """
    package = dp_accounting()
    orders, back = np.unique(np.ceil(ORDERS), return_inverse=True)
    accountant = package.rdp.RdpAccountant(orders)
    step = package.PoissonSampledDpEvent(share, package.GaussianDpEvent(noise_multiplier))
    accountant.compose(package.SelfComposedDpEvent(step, steps))
    rdp: Rdp = np.asarray(accountant._rdp)[back]  # the public methods give epsilon alone
    return rdp
