"""The analysis of a log on the command line:  python -m figures COMMAND LOG …"""

import signal
import sys

if not __package__:  # run as a folder, whose imports would fail
    sys.exit('error: wanted  python -m figures COMMAND LOG …')

from analysis.columns import LogError, hint  # noqa: E402
from figures import beyond_commands, paper_commands, report, tables  # noqa: E402

COMMANDS = {  # name: (function of the arguments that follow the name, help)
    'collapse': (paper_commands.collapse, 'scaling law, collapse tolerance Δ against noise floor σ, where supercollapse begins'),
    'power': (paper_commands.power, 'the smallest error in γ that Δ shows, and the Δ that the law predicts for wrong γ'),
    'horizon': (paper_commands.horizon, 'compute-optimal horizon C* = (p / scale)^exponent from constant-rate runs'),
    'schedules': (paper_commands.schedules, 'noise coefficient α, and loss curves predicted for other learning-rate schedules'),
    'conditions': (paper_commands.conditions, 'which of tokens per parameter, schedule, warm-up, batch and AdamW timescale differ'),
    'report': (report.report, 'one page to hand round: verdict, law, collapse with a slider for L0, conditions, larger models'),
    'reproduced': (paper_commands.reproduced, 'a run beside the published seeds of its model'),
    'tables': (tables.main, 'Markdown tables of several logs, one row a log'),
    'forecast': (beyond_commands.forecast, 'loss curve of a larger model, predicted from smaller ones'),
    'watch': (beyond_commands.watch, 'a run compared with its ladder while it trains'),
    'schedule-laws': (beyond_commands.schedule_laws, 'schedule laws fitted to two or three loss curves, which predict the others'),
}


def main(argv):
    """The exit status: 0, or 2 with one line on stderr for a wrong command or a log that cannot be analysed."""
    name, *rest = argv or ['--help']
    if name in ('-h', '--help'):
        print('usage: python -m figures COMMAND LOG …\n')
        for command, (_, text) in COMMANDS.items():
            print(f'  {command:14} {text}')
        print('\npython -m figures COMMAND --help lists the options of a command.')
        return 0
    if name not in COMMANDS:
        print(f'error: no command {name!r}{hint(name, COMMANDS)}', file=sys.stderr)
        return 2
    try:
        COMMANDS[name][0](rest)
    except LogError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as head may leave early
    sys.exit(main(sys.argv[1:]))
