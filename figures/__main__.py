"""The commands:  python -m figures {collapse,horizon,schedules,reproduced,tables,forecast,watch,schedule-laws} LOG …"""

import sys

from analysis.table import LogError
from figures import beyond_commands, paper_commands, tables

COMMANDS = {
    'collapse': paper_commands.collapse, 'horizon': paper_commands.horizon, 'schedules': paper_commands.schedules,
    'reproduced': paper_commands.reproduced, 'tables': tables.main, 'forecast': beyond_commands.forecast,
    'watch': beyond_commands.watch, 'schedule-laws': beyond_commands.schedule_laws}


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f'usage: python -m figures {{{",".join(COMMANDS)}}} LOG …')
    try:
        COMMANDS[sys.argv[1]](sys.argv[2:])
    except LogError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
