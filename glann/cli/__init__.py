"""The command line: parse, call, print.

Commands import what they need when they run: `glann --help` doesn't wait for torch.
"""

from glann.cli import comparing, experiments, looking, sampling, training
from glann.cli.group import COMMANDS, main

__all__ = ["COMMANDS", "comparing", "experiments", "looking", "main", "sampling", "training"]
