"""Runs a W&B sweep with two real agents, kills one agent's machine in the middle, and stops the server for a while.

    python tests/measure_sweep.py DIR                    # 12 points, 30 s without a server: about three minutes

The server is a stand-in on this machine (SUPERCOLLAPSE_SHARED/tools/wandb_loopback.py). Checked at the end: every point finished
exactly once, W&B's history of every run is complete and equals that of the run's folder, and save_logs.py writes all runs.
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
from trainer import checkpoint  # noqa: E402

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
    """The class of a stand-in for the W&B server that requeues preempted runs, as W&B does."""
    path = Path(os.environ['SUPERCOLLAPSE_SHARED']) / 'tools/wandb_loopback.py'
    spec = importlib.util.spec_from_file_location('wandb_loopback', path)
    module = sys.modules['wandb_loopback'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Server(module.WandbLoopback):
        def __init__(self):
            super().__init__()
            self.preempting, self.requeued = set(), []

        def _file_stream(self, entity, project, run_id, data):
            if data.get('preempting'):
                self.preempting.add(run_id)
            return super()._file_stream(entity, project, run_id, data)

        def machine_died(self, run):
            """The run is marked as crashed, as W&B does five minutes after the last heartbeat of a run."""
            run.forced_state = 'crashed'

    class Mutation(module.MutationNode):
        def _commands(self, sweep, agent, alive):
            for run in sweep.runs if not alive else ():
                if run.id in self.server.preempting and run.state in ('crashed', 'failed'):
                    self.server.requeued.append(run.id)
                    run.forced_state, run.heartbeat_at = 'pending', time.time()
                    agent.runs.append(run)
                    return [{'type': 'resume', 'run_id': run.id, 'program': sweep.config['program'],
                             'args': {name: {'value': value} for name, value in run.config.items()}}]
            return super()._commands(sweep, agent, alive)

    module.MutationNode = Mutation
    return Server


def wait_for(condition, seconds, what):
    """Waits until condition() is true and returns its value. Raises AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f'waited {seconds} s for {what}'
        time.sleep(0.1)
    return found


def process_tree(pid) -> list[int]:
    """A process and all its descendants, from /proc (Linux)."""
    children = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    return [pid, *(p for child in children for p in process_tree(child))]


class Machine:
    """A `wandb agent` and the processes that it starts."""

    def __init__(self, folder, env, sweep, number):
        self.out = folder / f'agent{number}.txt'
        with open(self.out, 'ab') as out:
            self.process = subprocess.Popen([sys.executable, '-m', 'wandb', 'agent', sweep], cwd=folder, env=env,
                                            stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def kill(self, number=signal.SIGKILL):
        for pid in process_tree(self.process.pid):
            os.kill(int(pid), number)
        self.process.wait()


def run_sweep(folder, widths, seeds, steps, outage, number=signal.SIGKILL):
    """Runs the grid as described at the top, checks it, and returns numbers about it."""
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
            wait_for(lambda: sweep.agents, 60, 'the first agent')
            machines.append(Machine(folder, env, sweep.path, 1))

            def run_with_checkpoint():  # of the first agent, and not close to its end
                for run in sweep.agents[0].runs:
                    saved = checkpoint.steps([folder / 'runs/tiny' / run.name])
                    if run.state == 'running' and run.history and saved and saved[0] < 0.8 * steps:
                        return run

            run = wait_for(run_with_checkpoint, 120, 'a run with a checkpoint')
            killed_at, rows_before = time.time(), len(run.history)
            machines[0].kill(number)
            if number == signal.SIGKILL:
                server.machine_died(run)
            machines[0] = Machine(folder, env, sweep.path, 0)
            finished = len([r for r in sweep.runs if r.state == 'finished'])
            wait_for(lambda: len([r for r in sweep.runs if r.state == 'finished']) > finished, 120, 'another run to finish')
            if outage:
                server.outage(outage, 'refuse')
                time.sleep(outage)

            def all_finished():
                nonlocal restarts
                if all(r.state == 'finished' for r in sweep.runs) and not sweep.waiting:
                    return True
                for i, machine in enumerate(machines):
                    if machine.process.poll() is not None:  # an agent gives up when its server is away for long
                        machines[i], restarts = Machine(folder, env, sweep.path, i), restarts + 1

            wait_for(all_finished, 300, 'the end of the sweep')
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
        assert server.requeued == [run.id], (server.requeued, run.id)
        assert sum(row['_timestamp'] < killed_at for row in run.history) >= rows_before > 0  # resumed, not started again
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
