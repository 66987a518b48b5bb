"""The best learning rate of an MLP by width, with and without the width rules of µP, under Adam, AdamW or Muon.

    python tests/measure_learning_rates.py muon          # two to six minutes on two cores

100 steps of 128 examples of the power-law task at constant rates a factor of two apart; the mean loss over SEEDS and the last forty
batches, whose minimum is interpolated by a parabola in log rate.
"""
import argparse
import sys
from pathlib import Path

import hydra
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from learning import best_rate, learn, power_law_batches  # noqa: E402

from trainer import config, process  # noqa: E402

WIDTHS = 32, 64, 128, 256
SEEDS = 4
LOG_RATES = {'adam': np.arange(-13, -5), 'adamw': np.arange(-13, -5), 'muon': np.arange(-11, -4)}
TIMESCALE = 0.3  # of AdamW, in lengths of the run


def resolve(name, *overrides):
    with hydra.initialize_config_dir(str(config.CONFIGS), version_base=None):
        return config.resolve(hydra.compose(name, list(overrides)))


def losses_by_rate(optimiser, D, targets):
    """{mup: losses [rate, seed, steps]}. At a fixed timescale the decay depends on the rate, so AdamW has a program for each."""
    if optimiser != 'adamw':
        return {mup: losses for mup, (_, losses) in learn(resolve, optimiser, 'mlp', D, 2.0**LOG_RATES[optimiser], 100, SEEDS,
                                                          targets).items()}
    runs = [learn(resolve, 'adam', 'mlp', D, [1.0], 100, SEEDS, targets, (f'opt.lr={rate}', f'opt.decay_timescale={TIMESCALE}'))
            for rate in 2.0**LOG_RATES['adamw']]
    return {mup: np.concatenate([run[mup][1] for run in runs]) for mup in (True, False)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('optimiser', choices=LOG_RATES)
    optimiser = parser.parse_args().optimiser
    process.enable_compilation_cache()
    targets, best = power_law_batches(resolve), {True: [], False: []}
    for D in WIDTHS:
        for mup, losses in losses_by_rate(optimiser, D, targets).items():
            best[mup].append(2 ** best_rate(LOG_RATES[optimiser], losses))
    print('| optimiser | µP | ' + ' | '.join(f'D={D}' for D in WIDTHS) + ' | largest / smallest |')
    for mup, rates in best.items():
        print(f'| {optimiser} | {"yes" if mup else "no"} | ' + ' | '.join(f'{rate:.2g}' for rate in rates) +
              f' | {max(rates) / min(rates):.1f} |')


if __name__ == '__main__':
    main()
