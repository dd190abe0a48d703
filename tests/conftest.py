"""Settings of the whole test run: eight CPU devices, and nothing else."""

import jax

# Before the first use of a device, also in every worker of pytest-xdist.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
