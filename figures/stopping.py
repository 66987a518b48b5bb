"""Stop the hopeless runs of a sweep early, by forecasts of their ends; and successive halving (ASHA, Hyperband) at the same budget.

    python -m figures.stopping SWEEP --against LADDER

A finished sweep is replayed: what would have been spent, and how far the run that is left is from the best. Runs of one size that
differ in their rates (or anything else) do not share one curve; a run that fares worse early may catch up as its rate decays. Where
the log has Tr Σ (Buvar), the loss is read as if the rate were taken off at once: L - ¼·η·Tr Σ (Qiu et al. 2025, eq. 14) at equal x.
"""

import itertools

import numpy as np
from scipy.special import ndtr

from figures import command, hierarchy, scaling_law, watch
from figures import table as logs
from figures.schedules import THEORY, settled_noise

RUNGS = (0.04, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85)  # where forecasts are asked: the knots of hierarchy.py
RISK = 0.05  # a run is stopped when it beats the leader with less probability


def curves(table, x, quiet):
    """({run: [K] losses at x}, {run: final loss}) of a sweep's runs; `quiet`: without the noise that decay will take off."""
    found, finals = {}, {}
    for run, rows in table[table['compute'] > 0].groupby('run', sort=False):
        if quiet:
            rate = (rows['lr'] / rows['peak_lr']).to_numpy()
            noise = np.nan_to_num(settled_noise(rows))
            rows = rows.assign(test_loss=rows['test_loss'] - np.minimum(THEORY * rate * noise, 0.5 * rows['test_loss']))
        found[run] = scaling_law.loss_at(rows, np.asarray(x) * rows['compute'].iloc[-1])
        finals[run] = rows['test_loss'].iloc[-1]
    return found, finals


def by_forecast(losses, x, ends, risk=RISK):
    """{run: share of its horizon trained}: at each rung the runs go that beat the leader's end with probability under `risk`.

    losses {run: [K]} at knots x; ends(x, loss) as watch.end: the final loss and how well it compares.
    """
    spent, alive = {run: 1.0 for run in losses}, list(losses)
    for rung in RUNGS:
        if len(alive) == 1:
            break
        k = x <= rung + 1e-9
        final = {run: ends(x[k], losses[run][k]) for run in alive}
        leader = min(alive, key=lambda run: final[run][0])
        worse = {run: (final[run][0] - final[leader][0]) / np.hypot(final[run][2], final[leader][2]) for run in alive}
        keep = [run for run in alive if ndtr(-worse[run]) >= risk]
        spent |= {run: rung for run in alive if run not in keep}
        alive = keep
    return spent


def halving(losses, x, eta, first):
    """{run: share trained} of successive halving: from x = first on, at each eta-fold x the best 1/eta go on (ASHA's rungs)."""
    spent, alive, rung = {run: 1.0 for run in losses}, list(losses), first
    while rung < 0.999 and len(alive) > 1:
        now = {run: np.interp(rung, x, losses[run]) for run in alive}
        keep = sorted(alive, key=now.get)[:max(1, int(np.ceil(len(alive) / eta)))]
        spent |= {run: rung for run in alive if run not in keep}
        alive, rung = keep, rung * eta
    return spent


def outcome(spent, finals):
    """(share of the sweep's compute spent, relative regret of the best run left against the best of all)."""
    left = min(finals[run] for run, share in spent.items() if share == 1)
    return float(np.mean(list(spent.values()))), float(left / min(finals.values()) - 1)


def settings():
    """Successive halving's settings: eta and first rung."""
    return [(eta, eta ** -k) for eta in (1.5, 2, 3, 4) for k in range(1, 9) if eta ** -k >= 0.04]


def compare(table, ladder_table, subset=None):
    """[(method, spent, regret)] averaged over sweeps: one a seed, or all subsets of so many of its runs.

    'forecast' and, where the log has Tr Σ, 'forecast, quiet' beside every setting of halving; all see the same losses.
    """
    ladder = hierarchy.gather(ladder_table)
    p = table['num_params'].iloc[-1]
    expected = watch.expect(ladder, p)
    x = expected.x
    quiet = {'lr', 'peak_lr', 'Buvar'} <= set(table)
    seen = {name: curves(table, x, name != 'forecast') for name in ['forecast'] + ['forecast, quiet'] * quiet}

    def ends(x, loss):
        return watch.end(expected, x, loss)

    seeds = logs.runs(table)['seed'] if 'seed' in table else None
    sweeps = [list(group.index) for _, group in logs.runs(table).groupby(seeds)] if seeds is not None else [table['run'].unique()]
    sweeps = [list(chosen) for runs in sweeps for chosen in itertools.combinations(runs, subset or len(runs))]
    results = {}
    for runs in sweeps:
        finals = {run: seen['forecast'][1][run] for run in runs}
        for name, (losses, _) in seen.items():
            results.setdefault(name, []).append(outcome(by_forecast({run: losses[run] for run in runs}, x, ends), finals))
            for eta, first in settings():
                label = f'halving η = {eta:g} from x = {first:.2f}' + name.removeprefix('forecast')
                results.setdefault(label, []).append(outcome(halving({run: losses[run] for run in runs}, x, eta, first), finals))
    return [(name, *np.mean(each, 0)) for name, each in results.items()]


def at_equal_budget(rows):
    """For each forecast row, the halving row (same losses) with the least regret among those that spend no more, or the closest."""
    pairs = []
    for name, spent, regret in rows:
        if name.startswith('forecast'):
            tail = name.removeprefix('forecast')
            rivals = [row for row in rows if row[0].startswith('halving') and (row[0].endswith(', quiet') == bool(tail))]
            within = [row for row in rivals if row[1] <= spent] or [min(rivals, key=lambda row: row[1])]
            pairs.append(((name, spent, regret), min(within, key=lambda row: (row[2], row[1]))))
    return pairs


def main():
    parse = command.parser(__doc__.splitlines()[0], 'stopping')
    parse.add_argument('--against', required=True, metavar='LADDER', help='the log of the ladder the sweep belongs to')
    parse.add_argument('--subset', type=int, metavar='N', help='average over all sub-sweeps of N runs')
    args = parse.parse_args()
    table, notes, _ = command.read(args)
    rows = compare(table, logs.clean(logs.load(args.against))[0], args.subset)
    lines = [f'{"":36} spent   regret']
    for ours, rival in at_equal_budget(rows):
        lines += [f'{name:36} {spent:5.0%}   {regret:.2%}' for name, spent, regret in (ours, rival)]
    command.report(args, {'rows': rows, 'at_equal_budget': at_equal_budget(rows)}, lines, notes)


if __name__ == '__main__':
    command.run(main)
