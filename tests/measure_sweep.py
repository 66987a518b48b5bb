"""A W&B sweep on preemptible machines: two real agents, one machine killed in the middle, the server gone for a while.

    python tests/measure_sweep.py DIR                    # 12 points, 30 s without a server: some three minutes

The server is a stand-in on this machine (SUPERCOLLAPSE_SHARED/tools/wandb_loopback.py). Checked at the end: every point finished
exactly once, every history is whole and is that of the run's folder, and save_logs.py writes all runs.
"""
import argparse
import collections
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402

SWEEP = """
program: {program}
method: grid
project: grid
entity: team
command: ['${{env}}', {python}, '${{program}}', -cn, mlp, wandb_mode=online, '${{args_no_hyphens}}']
parameters:
  wandb_project: {{value: grid}}
  wandb_tag: {{value: tiny}}
  checkpoint_minutes: {{value: 0.005}}
  model.N: {{value: 1}}
  model.base_D: {{value: 16}}
  opt.B: {{value: 64}}
  opt.lr: {{value: 0.01}}
  T: {{value: {T}}}
  T_eval: {{value: 64}}
  num_evals: {{value: 40}}
  token_per_param: {{value: null}}
  model.D: {{values: {widths}}}
  seed: {{values: {seeds}}}
"""


def loopback():
    """The module of the stand-in server, and a class of it that gives out again, as W&B does, runs that were preempted."""
    path = Path(os.environ['SUPERCOLLAPSE_SHARED']) / 'tools/wandb_loopback.py'
    spec = importlib.util.spec_from_file_location('wandb_loopback', path)
    module = sys.modules['wandb_loopback'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Server(module.WandbLoopback):
        def __init__(self):
            super().__init__()
            self.preempting, self.given_again = set(), []

        def _file_stream(self, entity, project, run_id, data):
            if data.get('preempting'):
                self.preempting.add(run_id)
            return super()._file_stream(entity, project, run_id, data)

        def machine_died(self, run):
            """What W&B notices five minutes after a run's last sign of life."""
            run.forced_state = 'crashed'

    class Mutation(module.MutationNode):
        def _commands(self, sweep, agent, alive):
            for run in sweep.runs if not alive else ():
                if run.id in self.server.preempting and run.state in ('crashed', 'failed'):
                    self.server.given_again.append(run.id)
                    run.forced_state, run.heartbeat_at = 'pending', time.time()
                    agent.runs.append(run)
                    return [{'type': 'resume', 'run_id': run.id, 'program': sweep.config['program'],
                             'args': {name: {'value': value} for name, value in run.config.items()}}]
            return super()._commands(sweep, agent, alive)

    module.MutationNode = Mutation
    return Server


def until(condition, seconds, what):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f'waited {seconds} s in vain for {what}'
        time.sleep(0.1)
    return found


def family(pid) -> list[int]:
    """A process and all that descend from it, by /proc (Linux)."""
    children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    return [pid, *(p for child in children for p in family(child))]


class Machine:
    """A `wandb agent` with all that it starts."""

    def __init__(self, folder, env, sweep, number):
        self.out = folder / f'agent{number}.txt'
        with open(self.out, 'ab') as out:
            self.process = subprocess.Popen([sys.executable, '-m', 'wandb', 'agent', sweep], cwd=folder, env=env,
                                            stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def kill(self, number=signal.SIGKILL):
        for pid in family(self.process.pid):
            os.kill(int(pid), number)
        self.process.wait()


def run_sweep(folder, widths, seeds, steps, outage, number=signal.SIGKILL):
    """Runs the grid as described above; returns numbers about it."""
    begin = time.monotonic()
    with loopback()() as server:
        env = server.env(WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL='1', JAX_PLATFORMS='cpu',
                         XDG_CACHE_HOME=os.environ.get('XDG_CACHE_HOME', str(ROOT / '.jax_cache')),
                         **{f'WANDB_{kind}_DIR': str(folder / kind) for kind in ('CACHE', 'CONFIG', 'DATA')})
        (folder / 'sweep.yaml').write_text(SWEEP.format(program=ROOT / 'train.py', python=sys.executable, T=64 * steps,
                                                        widths=widths, seeds=seeds))
        started = dict(cwd=folder, env=env, capture_output=True, text=True)
        made = subprocess.run([sys.executable, '-m', 'wandb', 'sweep', 'sweep.yaml'], **started)
        assert made.returncode == 0, made.stderr
        (sweep,) = server.sweeps.values()
        machines, restarts = [Machine(folder, env, sweep.path, 0)], 0
        try:
            until(lambda: sweep.agents, 60, 'the first agent')
            machines.append(Machine(folder, env, sweep.path, 1))

            def victim():  # the first machine goes in the middle of a run that has saved a state
                for run in sweep.agents[0].runs:
                    saved = checkpoint.steps([folder / 'runs/tiny' / run.name])
                    if run.state == 'running' and run.history and saved and saved[0] < 0.8 * steps:
                        return run

            run = until(victim, 120, 'a run with a checkpoint')
            killed_at, rows_before = time.time(), len(run.history)
            machines[0].kill(number)
            if number == signal.SIGKILL:
                server.machine_died(run)
            machines[0] = Machine(folder, env, sweep.path, 0)
            finished = len([r for r in sweep.runs if r.state == 'finished'])
            until(lambda: len([r for r in sweep.runs if r.state == 'finished']) > finished, 120, 'another run to finish')
            if outage:
                server.outage(outage, 'refuse')
                time.sleep(outage)

            def over():
                nonlocal restarts
                if all(r.state == 'finished' for r in sweep.runs) and not sweep.waiting:
                    return True
                for i, machine in enumerate(machines):
                    if machine.process.poll() is not None:  # an agent whose server is gone for long gives up
                        machines[i], restarts = Machine(folder, env, sweep.path, i), restarts + 1

            until(over, 300, 'the end of the sweep')
        finally:
            for machine in machines:
                if machine.process.poll() is None:
                    machine.kill()
        points = collections.Counter((r.config['model.D'], r.config['seed']) for r in sweep.runs)
        assert points == {(D, seed): 1 for D in widths for seed in seeds}, points
        for r in sweep.runs:
            on_disk = [json.loads(line) for line in (folder / 'runs/tiny' / r.name / 'history.jsonl').read_text().splitlines()]
            logged = [{k: v for k, v in row.items() if not k.startswith('_')} for row in r.history]
            assert logged == on_disk and on_disk[-1]['step'] == steps, r.name
            assert json.loads((folder / 'runs/tiny' / r.name / 'summary.json').read_text())['state'] == 'finished'
        assert server.given_again == [run.id], (server.given_again, run.id)
        assert sum(row['_timestamp'] < killed_at for row in run.history) >= rows_before > 0  # it went on, and did not start over
        saved = subprocess.run([sys.executable, ROOT / 'save_logs.py', '--project', 'grid', '--entity', 'team', '--tag', 'tiny',
                                '--out', folder / 'log.parquet'], **started)
        assert saved.returncode == 0, saved.stderr
        assert int(re.search(r'(\d+) runs', saved.stdout)[1]) == len(points), saved.stdout + saved.stderr
        return {'points': len(points), 'seconds': time.monotonic() - begin, 'restarts': restarts, 'rows before': rows_before,
                'requests': len(server.requests), 'unsupported': server.unsupported}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('dir', type=Path)
    parser.add_argument('--points', type=int, default=12)
    parser.add_argument('--steps', type=int, default=8000)
    parser.add_argument('--outage', type=float, default=30)
    args = parser.parse_args()
    args.dir.mkdir(parents=True)
    print(run_sweep(args.dir.absolute(), [16, 24, 32], list(range(args.points // 3)), args.steps, args.outage))


if __name__ == '__main__':
    main()
