"""Draws from a posterior in a few dimensions by adaptive multiple importance sampling (Cornuet et al. 2012).

The parameters z have a standard normal prior, so likelihood × prior has light tails. Each round proposes draws from a Student t
distribution with the mean and covariance of all draws so far; the first round starts from the prior. Every draw is weighted by the
mixture of all proposals, so no draw is thrown away.
"""

import numpy as np
from scipy.special import logsumexp, softmax
from scipy.stats import multivariate_t

from analysis.table import LogError

DEGREES_OF_FREEDOM = 5         # of the Student t proposals: heavier tails than the target's
MIN_EFFECTIVE_SAMPLE_SIZE = 400
DRAWS_PER_ROUND = 400
SAMPLE_SIZE = 500


def sample(log_likelihood, dimensions, rng, max_rounds=30):
    """Returns draws of z [SAMPLE_SIZE, dimensions] from the posterior, resampled to equal weights.

    log_likelihood maps z [n, dimensions] to [n]. The rounds end when the effective sample size reaches MIN_EFFECTIVE_SAMPLE_SIZE.
    Raises LogError if it stays below a tenth of that after max_rounds.
    """
    z, log_target = np.empty((0, dimensions)), np.empty(0)
    proposals = [(np.zeros(dimensions), np.eye(dimensions))]  # mean and covariance of each round
    for _ in range(max_rounds):
        mean, covariance = proposals[-1]
        normal, chi2 = rng.normal(size=(DRAWS_PER_ROUND, dimensions)), rng.chisquare(DEGREES_OF_FREEDOM, (DRAWS_PER_ROUND, 1))
        new = mean + (normal / np.sqrt(chi2 / DEGREES_OF_FREEDOM)) @ np.linalg.cholesky(covariance).T
        z = np.concatenate([z, new])
        log_target = np.concatenate([log_target, log_likelihood(new) - (new ** 2).sum(1) / 2])
        mixture = logsumexp([multivariate_t.logpdf(z, *proposal, DEGREES_OF_FREEDOM) for proposal in proposals], axis=0)
        weight = softmax(log_target - mixture)
        if effective_sample_size(weight) >= MIN_EFFECTIVE_SAMPLE_SIZE:
            break
        # The weights are tempered until ten draws a dimension count, as a few lucky draws would make the proposal too narrow.
        power, tempered = 1.0, weight
        while effective_sample_size(tempered) < 10 * dimensions:
            power *= 0.8
            tempered = softmax(power * (log_target - mixture))
        proposals.append((tempered @ z, np.cov(z.T, aweights=tempered, ddof=0) + 1e-6 * np.eye(dimensions)))
    if not effective_sample_size(weight) >= MIN_EFFECTIVE_SAMPLE_SIZE / 10:
        raise LogError(f'the posterior could not be sampled: {len(z)} draws have an effective sample size of '
                       f'{effective_sample_size(weight):.0f}; check the log for runs that do not belong to one ladder')
    cumulative = np.cumsum(weight)  # systematic resampling
    return z[np.searchsorted(cumulative / cumulative[-1], (np.arange(SAMPLE_SIZE) + rng.random()) / SAMPLE_SIZE)]


def effective_sample_size(weight):
    """1/Σw² of weights that sum to one."""
    return 1 / (weight ** 2).sum()
