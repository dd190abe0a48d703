#!/bin/bash
# A run on several nodes under SLURM. Change the nine lines below, then
# `sbatch train/launch/slurm.sh` in the checkout.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300 --requeue --open-mode=append
OUT=/shared/runs/llama_1b   # a folder that all nodes see
CACHE=/tmp/galore_optax     # tokenizer and text, on each node
PYTHON=.venv/bin/python
SETTINGS=(--preset llama_1b --set mesh.fsdp=16)

# There is a task for each GPU, because JAX gives each task one GPU of its node.
# 300 s before the time is up SLURM asks the tasks to stop, but not this script.
# A signal reaches this script only if the job is cancelled or preempted.
ended=
trap 'ended=yes' TERM
srun --kill-on-bad-exit=1 "$PYTHON" -m train.pretrain "${SETTINGS[@]}" \
  --set data.cache="$CACHE" --out "$OUT" &
tasks=$!
wait "$tasks"
status=$?
if [ "$ended" ]; then
  wait "$tasks"   # they are saving
  status=$?
elif [ "$status" -eq 130 ]; then
  scontrol requeue "$SLURM_JOB_ID"   # time is up; goes on from what is saved
fi
exit "$status"
