"""Settings of the whole test run: eight CPU devices, and a quick compiler.

The tests run small programs a few times, and most of their time would go into
optimising them. `XLA_FLAGS= pytest` compiles them as users do.
"""

import os

os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
  " --xla_cpu_parallel_codegen_split_count=1",
)

import jax

# Before the first use of a device, also in every worker of pytest-xdist.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
