"""Pre-training a LLaMA with GaLore: run `python -m train.pretrain`.

Not installed with the package: the scripts run from a checkout, use only the
public names of `galore_optax`, and are meant to be copied and changed.
"""

import sys

from train.common import commands

if sys.argv[:1] == ["-m"]:  # `python -m train.…` is about to import a command
  commands.handle_imports()
