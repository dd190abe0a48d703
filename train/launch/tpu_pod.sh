#!/bin/bash
# A run on all workers of a TPU slice, from a machine with gcloud:
#   train/launch/tpu_pod.sh start | log | stop
# The first four lines are to be changed. Each worker has the checkout, with a
# virtual environment in it, at the same path.
TPU=(my-slice --zone us-west4-a)
CHECKOUT=/shared/galore-optax   # on the workers
OUT=/shared/runs/llama_7b       # a folder that all workers see
SETTINGS=(--preset llama_7b --set mesh.fsdp=16 --set train.accumulate=32)

# The workers do not know of each other from their environment, but JAX can ask.
SETTINGS+=(--set mesh.coordinator=auto --out "$OUT")
on_all() {
  gcloud compute tpus tpu-vm ssh "${TPU[@]}" --worker=all --command "$1"
}
case $1 in
  start)
    # Goes on when the connection ends.
    on_all "cd $CHECKOUT && { nohup .venv/bin/python -m train.pretrain \
      ${SETTINGS[*]@Q} < /dev/null > ~/pretrain.log 2>&1 &
      echo \$! > ~/pretrain.pid; }" ;;
  log) on_all "tail -n 3 ~/pretrain.log" ;;
  stop) on_all "kill -TERM \$(cat ~/pretrain.pid)" ;; # saves; see the log
  *) sed -n '2,5p' "$0"; exit 2 ;;
esac
