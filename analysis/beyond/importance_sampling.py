"""Draws from a posterior in a few dimensions by adaptive multiple importance sampling (Cornuet et al. 2012).

The parameters z have a standard normal prior, so likelihood × prior has light tails. Each round proposes draws from a Student t
distribution with the mean and covariance of all draws so far; the first round starts from the prior. Every draw is weighted by the
mixture of all proposals, so no draw is thrown away.
"""

import numpy as np
from scipy.special import logsumexp

from analysis.table import LogError

DEGREES_OF_FREEDOM = 5         # of the Student t proposals: heavier tails than the target's
MIN_EFFECTIVE_SAMPLE_SIZE = 400
DRAWS_PER_ROUND = 400


def sample(log_likelihood, dimensions, rng, size=500, max_rounds=30):
    """Returns `size` draws of z [size, dimensions] from the posterior, resampled to equal weights.

    log_likelihood maps z [n, dimensions] to [n]. The rounds end when the effective sample size reaches MIN_EFFECTIVE_SAMPLE_SIZE.
    Raises LogError if it stays below a tenth of that after max_rounds.
    """
    z, log_target = np.empty((0, dimensions)), np.empty(0)
    proposals = [(np.zeros(dimensions), np.eye(dimensions))]
    for _ in range(max_rounds):
        mean, factor = proposals[-1]
        normal, chi2 = rng.normal(size=(DRAWS_PER_ROUND, dimensions)), rng.chisquare(DEGREES_OF_FREEDOM, (DRAWS_PER_ROUND, 1))
        new = mean + (normal / np.sqrt(chi2 / DEGREES_OF_FREEDOM)) @ factor.T
        z = np.concatenate([z, new])
        log_target = np.concatenate([log_target, log_likelihood(new)])
        log_weight = log_target - (z ** 2).sum(1) / 2 - _log_mixture_density(z, proposals)
        weight = _normalised(log_weight)
        if effective_sample_size(weight) >= MIN_EFFECTIVE_SAMPLE_SIZE:
            break
        proposals.append(_next_proposal(z, log_weight))
    if not effective_sample_size(weight) >= MIN_EFFECTIVE_SAMPLE_SIZE / 10:
        raise LogError(f'the posterior could not be sampled: {len(z)} draws have an effective sample size of '
                       f'{effective_sample_size(weight):.0f}; check the log for runs that do not belong to one ladder')
    cumulative = np.cumsum(weight)  # systematic resampling
    return z[np.searchsorted(cumulative / cumulative[-1], (np.arange(size) + rng.random()) / size)]


def effective_sample_size(weight):
    """1/Σw² of weights that sum to one."""
    return 1 / (weight ** 2).sum()


def _log_mixture_density(z, proposals):
    """Log of the summed Student t densities [n] at z [n, d], up to a constant."""
    power = (DEGREES_OF_FREEDOM + z.shape[1]) / 2
    return logsumexp([-power * np.log1p((np.linalg.solve(factor, (z - mean).T) ** 2).sum(0) / DEGREES_OF_FREEDOM)
                      - np.log(np.diagonal(factor)).sum() for mean, factor in proposals], axis=0)


def _next_proposal(z, log_weight):
    """(mean, Cholesky factor of the covariance) of the weighted draws.

    The weights are tempered until ten draws a dimension count. Otherwise a few lucky draws would make the proposal too narrow.
    """
    power = 1.0
    while effective_sample_size(weight := _normalised(log_weight, power)) < 10 * z.shape[1]:
        power *= 0.8
    mean = weight @ z
    covariance = (weight * (z - mean).T) @ (z - mean) + 1e-6 * np.eye(z.shape[1])
    return mean, np.linalg.cholesky(covariance)


def _normalised(log_weight, power=1.0):
    weight = np.exp(power * (log_weight - log_weight.max()))
    return weight / weight.sum()
