"""Share of faulty and of healthy laptop runs that raise the monitor's alarm, by x = 0.3 and by the end.

    python -m benchmarks.watch_faults

The healthy runs are the ladder's own, each compared with the others. The faulty runs are in the logs of
experiments/laptop_fault_*.yaml and experiments/laptop_mlp_no_mup.yaml.
"""

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


def main():
    print(f'{"fault":18} {"runs":>5}  by x = 0.3  by the end  median x')
    for row in monitor.detection_rates(clean(load(LADDER))[0], faulty_runs()):
        print(f'{row["fault"]:18} {row["runs"]:5}  {row["by 0.3"]:10.0%}  {row["by the end"]:10.0%}  {row["median x"]:8.2f}')


if __name__ == '__main__':
    main()
