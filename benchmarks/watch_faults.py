"""Share of faulty and of healthy laptop runs that raise the monitor's alarm, by x = 0.3 and by the end.

    python -m benchmarks.watch_faults

The healthy runs are the ladder's own, each compared with the others. The faulty runs are in the logs of
experiments/laptop_fault_*.yaml and experiments/laptop_mlp_no_mup.yaml.
"""

import numpy as np

from analysis.beyond import monitor
from analysis.table import clean, load, where

LADDER = 'logs/laptop_mlp.parquet'


def faulty_runs():
    """{fault: table of its runs}."""
    rates, horizon = load('logs/laptop_fault_lr.parquet'), load('logs/laptop_fault_horizon.parquet')
    no_mup = load('logs/laptop_mlp_no_mup.parquet')
    no_mup = no_mup[no_mup['D'] != no_mup['match_mup_at_D']]  # at this width the multipliers are the ladder's
    tables = {'learning rate × 2': where(rates, 'peak_lr=0.002'), 'learning rate ÷ 2': where(rates, 'peak_lr=0.0005'),
              'horizon × 1.5': horizon, 'no µP': no_mup}
    return {fault: clean(table)[0] for fault, table in tables.items()}


def first_alarm(reading, by=1.0, level=monitor.DEFAULT_ALARM_LEVEL):
    """x of the first alarm that somebody watching the run up to x = by would have seen, or NaN."""
    low = reading.p_value < level
    alarms = np.flatnonzero(low[1:] & low[:-1] & (reading.x[1:] <= by + 1e-9))
    return float(reading.x[alarms[0] + 1]) if len(alarms) else np.nan


def detection_rates(ladder_table, faulty):
    """A dict a kind of fault: the share of runs alarmed by x = 0.3 and by the end. faulty is {fault: table}.

    Runs are counted if their size is in the ladder. The first dict is that of the ladder's healthy runs. They also set the alarm
    level, so theirs is at most FALSE_ALARM_RATE by construction.
    """
    rows, level = [], monitor.alarm_level(ladder_table)
    for fault, table in {'none (healthy)': ladder_table, **faulty}.items():
        readings = monitor.read_finished(table[table['num_params'].isin(ladder_table['num_params'])], ladder_table)
        early, ever = (np.array([first_alarm(one, by, level) for one in readings]) for by in (0.3, 1.0))
        rows.append({'fault': fault, 'runs': len(readings), 'by 0.3': float(np.isfinite(early).mean()),
                     'by the end': float(np.isfinite(ever).mean()),
                     'median x': float(np.nanmedian(ever)) if np.isfinite(ever).any() else np.nan})
    return rows


def main():
    print(f'{"fault":18} {"runs":>5}  by x = 0.3  by the end  median x')
    for row in detection_rates(clean(load(LADDER))[0], faulty_runs()):
        print(f'{row["fault"]:18} {row["runs"]:5}  {row["by 0.3"]:10.0%}  {row["by the end"]:10.0%}  {row["median x"]:8.2f}')


if __name__ == '__main__':
    main()
