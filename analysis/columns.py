"""The columns of a log with their units, the error that every module of the analysis raises, and hints at misspelt names.

Units are raw: tokens, FLOPs, and the loss as it was trained on (nats, or ½·squared error). A value that is not known is NaN.
"""

import difflib

PETA = 1e15  # FLOPs; the unit of compute in the scaling law, in the horizon rule and in the authors' logs

# Columns with one value a run, in the order in which they are written. All but the text columns are float64.
RUN_COLUMNS = (
    'run', 'tag', 'state',
    'parent',                         # the run that this one branches off, e.g. an anneal; its rows begin at the branch
    'D', 'N', 'L', 'V',               # width, blocks, sequence length (1 for the MLP), vocabulary or input size
    'B',                              # sequences in a batch
    'peak_lr',                        # opt.lr, the base learning rate; the column lr below is the rate at an evaluation
    'optimizer',                      # adam | muon
    'weight_decay',                   # λ; a step takes the share rate·λ from a weight, as in PyTorch's AdamW
    'independent_decay', 'decay_timescale',  # the other ways to set it: opt.independent_decay; opt.decay_timescale, in runs
    'decay_per_step',                 # in all three ways: share of a hidden weight that a step at the peak rate takes
    'schedule', 'decay_frac', 'warmup_tokens', 'seed',
    'T',                              # tokens
    'num_params', 'scale', 'exponent', 'match_mup_at_D',
    'entropy',                        # loss of the true distribution on the test batches, nats, where it is known
    'opt_compute',                    # FLOPs; the compute-optimal compute C* of the run's model, where the log knows it
    'num_test_batches',               # test batches that the gradient traces were measured on
    'revision', 'device',             # of the source code; of the machine
    'seconds')                        # the run's share of the wall time of the process that trained it

# Columns with one value an evaluation.
ROW_COLUMNS = (
    'step', 'tokens', 'compute',      # compute = 6·tokens·num_params FLOPs
    'tau',                            # sum of the learning rate over the steps before this one
    'lr', 'test_loss', 'train_loss',
    'Bgvar', 'Buvar', 'gvar', 'uvar', 'g2_mean', 'u2_mean', 'gmean2', 'umean2',  # of the gradient, see optimizer.py
    'h', 'f', 'dh', 'df',             # rms of the last features, of the logits, and of their changes
    'residual', 'p_value', 'forecast', 'forecast_lo90', 'forecast_hi90')        # of a run that is watched

TEXT_COLUMNS = ('run', 'tag', 'state', 'parent', 'optimizer', 'schedule', 'revision', 'device')


class LogError(ValueError):
    """A log cannot be read, or lacks what the analysis needs. The message is one line for the user."""


def hint(name, names):
    """The end of an error message: '; did you mean …?' with the names that contain `name` or are like it, else '; there are …'."""
    names = sorted(map(str, names))
    near = [one for one in names if str(name).lower() in one.lower()][:3] or difflib.get_close_matches(str(name), names, 3)
    return f'; did you mean {" or ".join(near)}?' if near else f'; there are {", ".join(names[:40])}{" …" * (len(names) > 40)}'
