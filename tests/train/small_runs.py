"""A small run for tests that start processes, and what it leaves in its folder.

What a process does is here: to import this module does not start JAX's backend.
"""

import functools
import json
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

import models
import train.__main__ as command_line
from train import program, run, signals
from train.run import checkpoint_folder

# Two seeds, three epochs of two steps each, and a checkpoint after each epoch.
EPOCHS = 3
LAST_STEP = 6
COMMAND = (
    *("classification", "--dataset=digits", "--batch-size=500", f"--epochs={EPOCHS}"),
    *("--techniques=perturbed_unit_step,scale_by_random", "--augment=pad_crop"),
    *("--ema=0.9", "--seeds=2", "--log-every=1", "--checkpoint-minutes=0"),
)


class SmallNetwork(models.Network):
    """A network that is compiled at once, with all that a state may hold."""

    def __init__(self, rngs, in_channels, num_classes):
        self.norm = nnx.BatchNorm(in_channels, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(64 * in_channels, num_classes, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(self.norm(x))
        return self.head(x.reshape(len(x), -1))


def create_small(name, *, rngs, dtype, in_channels, num_classes):
    return SmallNetwork(rngs, in_channels, num_classes)


def use_small_network():
    models.create = create_small


def train(folder, *more):
    """What a process does: the command, with a small network."""
    signals.listen()
    use_small_network()
    sys.argv = ["train", *COMMAND, f"--run-dir={folder}", *more]
    command_line.main()


def train_again(folder):
    """Trains as `train` does, with the compiled program of earlier runs of the process.

    The program knows nothing of a run: only its state and its feeds belong to a seed.
    """
    run.open_program = lambda config, progress: _program_of(config)
    train(folder)


@functools.cache
def _program_of(config):
    return program.open_program(config)


def train_with_room_for_one(folder):
    """Trains where there is no room for a second checkpoint."""
    disk_usage = shutil.disk_usage

    def usage(path):
        full = Path(path, "2").exists()
        return disk_usage(path)._replace(free=100) if full else disk_usage(path)

    shutil.disk_usage = usage
    train(folder)


def read(command, folder, *more):
    """Predicts, exports or compares what a run has trained."""
    signals.listen()
    use_small_network()
    sys.argv = ["train", command, str(folder), *map(str, more)]
    command_line.main()


def train_part(folder, more, more_of_second, index, port):
    """What each of the processes does."""
    together = (f"--coordinator=localhost:{port}", "--num-processes=2")
    more = (*more, *(more_of_second if index else ()))
    train(folder, *more, *together, f"--process-id={index}")


def lose_weights(folder, weights, index, port):
    """Trains from weights that the second of two processes cannot read."""

    def load_weights(*args, **kwargs):
        raise FileNotFoundError("the weights are gone")

    if index:
        models.load_weights = load_weights
    train_part(folder, (f"--weights={weights}",), (), index, port)


def train_with_fast_clock(index, port):
    """Trains as one of two processes, of which the second has a fast clock."""
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    from tests.train.small_tasks import Recorder, make_program, without_seconds
    from train.parallel import make_mesh

    clock = run.time.perf_counter
    if index:
        run.time = types.SimpleNamespace(perf_counter=lambda: 1e6 * clock())
    recorder = Recorder()
    made = make_program(mesh=make_mesh(), config={"batch_size": 2, "epochs": 1})
    run.train_seed(made, 0, recorder)
    print(json.dumps([recorder.counts, without_seconds(recorder.epochs)]))


def records(folder, name="metrics.jsonl"):
    path = folder / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def last_step(folder, seed=0):
    names = [path.name for path in checkpoint_folder(folder, seed).iterdir()]
    return max((int(name) for name in names if name.isdigit()), default=0)


def last_state(folder, seed=0):
    """Arrays of the last checkpoint by name, and its seconds."""
    path = checkpoint_folder(folder, seed) / str(last_step(folder, seed))
    about = json.loads((path / "about.json").read_text())
    with ocp.PyTreeCheckpointer() as checkpointer:
        names = checkpointer.metadata(path).item_metadata.tree
        args = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
        arrays = checkpointer.restore(path, restore_args=args)
    assert len(arrays) > 20
    return arrays, about["seconds"]
