"""The stages that a configuration asks for, planned and not run, for the tests of configurations."""

import copy

from align_loop.launch import inline
from align_loop.loop import Run
from align_loop.store import Store


class Recorder(Store):
    """A store that plans, and keeps what it was asked for."""

    def run(self, stage):
        self.stages = [*getattr(self, "stages", []), stage]
        return super().run(stage)


def planned(config, folder):
    store = Recorder(folder / "store", folder / "run", inline.run, dry_run=True)
    Run(config, store, "hf").walk()
    return store.stages


def keyed(config, folder):
    """Everything of a run's stages that is part of their keys."""
    return [
        (s.name, s.run, s.config, sorted(s.parts), s.seed, {k: (a.digest, a.name) for k, a in s.inputs.items()})
        for s in planned(config, folder)
    ]


def changed(node, name, value):
    """A copy of a composed configuration with one key, named with dots, set to ``value``."""
    new = copy.deepcopy(node)
    *groups, last = name.split(".")
    at = new
    for group in groups:
        at = at[int(group) if group.isdigit() else group]
    at[int(last) if last.isdigit() else last] = value
    return new
