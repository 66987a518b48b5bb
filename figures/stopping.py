"""Stop the hopeless runs of a sweep early, by forecasts of their ends; successive halving, Hyperband and ASHA at the same budget.

    python -m figures.stopping SWEEP --against LADDER

A finished sweep is replayed: what would have been spent, and how far the run that is left is from the best. Runs of one size that
differ in their rates (or anything else) do not share one curve; a run that fares worse early may catch up as its rate decays. Where
the log has Tr Σ (Buvar), the loss is read as if the rate were taken off at once: L - ¼·η·Tr Σ (Qiu et al. 2025, eq. 14) at equal x.
"""

import heapq
import itertools

import numpy as np
from scipy.special import ndtr

from figures import command, hierarchy, scaling_law, watch
from figures import table as logs
from figures.schedules import THEORY, settled_noise

RUNGS = hierarchy.KNOTS[1:-1]  # x where forecasts are asked: 0.04 to 0.85
WORKERS = 4  # that ASHA keeps busy
ORDERS = 10  # random orders of the runs that Hyperband and ASHA, which depend on it, are averaged over
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
    """{run: share trained} of successive halving: from x = first on, at each eta-fold x the best 1/eta go on."""
    spent, alive, rung = {run: 1.0 for run in losses}, list(losses), first
    while rung < 0.999 and len(alive) > 1:
        now = {run: np.interp(rung, x, losses[run]) for run in alive}
        keep = sorted(alive, key=now.get)[:max(1, int(np.ceil(len(alive) / eta)))]
        spent |= {run: rung for run in alive if run not in keep}
        alive, rung = keep, rung * eta
    return spent


def hyperband(losses, x, eta, first, order):
    """{run: share trained} of Hyperband (Li et al. 2018, algorithm 1) on a finite sweep, its runs dealt to the brackets in `order`.

    Bracket s halves from x = eta^-s on, s from that of `first` down to 0, where nothing is stopped; its share of the runs is the
    algorithm's, eta^s/(s + 1).
    """
    s = np.arange(round(-np.log(first) / np.log(eta)), -1, -1)
    share = np.cumsum(eta ** s / (s + 1.0))
    spent = {}
    for one, runs in zip(s, np.split(np.array(order), np.round(share[:-1] / share[-1] * len(order)).astype(int)), strict=True):
        spent |= halving({run: losses[run] for run in runs}, x, eta, eta ** -float(one))
    return spent


def asha(losses, x, eta, first, order):
    """{run: share trained} of ASHA (Li et al. 2020, algorithm 2) with WORKERS workers, runs started in `order`.

    A free worker takes the best run that is among the best 1/eta of those that reached its rung so far, from the highest rung down,
    and trains it to the next; if there is none, it starts a new run. The best of the highest rung reached is trained to its end.
    """
    rungs = [*itertools.takewhile(lambda rung: rung < 0.999, (first * eta ** k for k in itertools.count())), 1.0]
    reached, gone, waiting, busy, clock, spent = [{} for _ in rungs], set(), list(order), [], 0.0, {}

    def next_job():
        for k in range(len(rungs) - 2, -1, -1):
            best = sorted(reached[k], key=reached[k].get)[:int(len(reached[k]) / eta)]
            for run in best:
                if (run, k) not in gone:
                    gone.add((run, k))
                    return run, k + 1
        return (waiting.pop(0), 0) if waiting else None

    while True:
        while len(busy) < WORKERS and (job := next_job()):
            run, k = job
            heapq.heappush(busy, (clock + rungs[k] - spent.get(run, 0), run, k))
        if not busy:
            break
        clock, run, k = heapq.heappop(busy)
        spent[run], reached[k][run] = rungs[k], np.interp(rungs[k], x, losses[run])
    highest = [rung for rung in reached if rung][-1]
    return spent | {min(highest, key=highest.get): 1.0}


def outcome(spent, finals):
    """(share of the sweep's compute spent, relative regret of the best run left against the best of all)."""
    left = min(finals[run] for run, share in spent.items() if share == 1)
    return float(np.mean(list(spent.values()))), float(left / min(finals.values()) - 1)


def settings():
    """The rivals' settings: eta and first rung."""
    return [(eta, eta ** -k) for eta in (1.5, 2, 3, 4) for k in range(1, 9) if eta ** -k >= 0.04]


def compare(table, ladder_table, subset=None):
    """[(method, setting, spent, regret)] averaged over sweeps: one a seed, or all subsets of so many of its runs.

    'forecast' and, where the log has Tr Σ, 'forecast, quiet' beside every setting of its rivals; all see the same losses.
    """
    ladder = hierarchy.gather(ladder_table)
    p = table['num_params'].iloc[-1]
    expected, rng = watch.expect(ladder, p), np.random.default_rng(0)
    x = expected.x
    quiet = {'lr', 'peak_lr', 'Buvar'} <= set(table)
    seen = {tail: curves(table, x, bool(tail)) for tail in [''] + [', quiet'] * quiet}

    def ends(x, loss):
        return watch.end(expected, x, loss)

    seeds = logs.runs(table)['seed'] if 'seed' in table else None
    sweeps = [list(group.index) for _, group in logs.runs(table).groupby(seeds)] if seeds is not None else [table['run'].unique()]
    sweeps = [list(chosen) for runs in sweeps for chosen in itertools.combinations(runs, subset or len(runs))]
    results = {}
    for runs in sweeps:
        orders = [rng.permutation(runs) for _ in range(ORDERS)]
        finals = {run: seen[''][1][run] for run in runs}
        for tail, (all_losses, _) in seen.items():
            losses = {run: all_losses[run] for run in runs}
            results.setdefault(('forecast' + tail, ''), []).append(outcome(by_forecast(losses, x, ends), finals))
            for eta, first in settings():
                label = f'η = {eta:g} from x = {first:.2f}'
                spent = {'halving': [halving(losses, x, eta, first)],
                         'Hyperband': [hyperband(losses, x, eta, first, order) for order in orders],
                         'ASHA': [asha(losses, x, eta, first, order) for order in orders]}
                for name, each in spent.items():
                    results.setdefault((name + tail, label), []).append(np.mean([outcome(one, finals) for one in each], 0))
    return [(*name, *np.mean(each, 0)) for name, each in results.items()]


def at_equal_budget(rows):
    """Each forecast row, followed by each rival's of the same losses: the setting with the least regret, in hindsight, among those
    that spend no more, or the one that spends least."""
    found = []
    for ours in rows:
        method, _, budget, _ = ours
        if method.startswith('forecast'):
            found.append(ours)
            for name in ('halving', 'Hyperband', 'ASHA'):
                rivals = [row for row in rows if row[0] == name + method.removeprefix('forecast')]
                within = [row for row in rivals if row[2] <= budget] or [min(rivals, key=lambda row: row[2])]
                found.append(min(within, key=lambda row: (row[3], row[2])))
    return found


def main():
    parse = command.parser(__doc__.splitlines()[0], 'stopping', figure=False)
    parse.add_argument('--against', required=True, metavar='LADDER', help='the log of the ladder the sweep belongs to')
    parse.add_argument('--subset', type=int, metavar='N', help='average over all sub-sweeps of N runs')
    args = parse.parse_args()
    table, notes, _ = command.read(args)
    rows = compare(table, logs.clean(logs.load(args.against))[0], args.subset)
    shown = at_equal_budget(rows)
    lines = [f'{"":40} spent   regret']
    lines += [f'{method:18} {setting:21} {spent:5.0%}   {regret:.2%}' for method, setting, spent, regret in shown]
    command.report(args, {'rows': rows, 'at_equal_budget': shown}, lines, notes)


if __name__ == '__main__':
    command.run(main)
